"""What is drawn for a pair, and what the noise makes of its latents."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_density_for_timestep_sampling
from splitmix import chained
from torch.utils._python_dispatch import TorchDispatchMode

from polydpo_fast.diffusion import draw_noise, draw_timesteps, noise_pairs
from polydpo_fast.diffusion.noising import _normals

SEEDS = [3, 2**63 - 1, 0, 17]


def test_noise_is_a_function_of_the_seed(monkeypatch):
    whole = draw_noise(SEEDS, (4, 5, 3))
    assert whole.dtype == torch.float32
    assert whole.shape == (4, 4, 5, 3)
    for row, seed in zip(whole, SEEDS, strict=True):
        assert torch.equal(draw_noise(torch.tensor([seed]), (4, 5, 3))[0], row)
    assert torch.equal(draw_noise(list(reversed(SEEDS)), (4, 5, 3)).flip(0), whole)
    monkeypatch.setattr("polydpo_fast.diffusion.noising._AT_ONCE", 70)  # three rows, then one
    assert torch.equal(draw_noise(SEEDS, (4, 5, 3)), whole)
    assert draw_noise([], (4, 5, 3)).shape == (0, 4, 5, 3)
    assert draw_noise(SEEDS, (4, 0)).shape == (4, 4, 0)


def test_noise_against_the_same_in_integers():
    """The generator written out with Python's integers."""
    (row,) = draw_noise([42], (7,)).tolist()
    first, second = [], []
    for i in range(4):
        z = (i * 0x9E3779B97F4A7C15 + chained(42, 1)) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        u, v = ((z >> 32) + 0.5) / 2**32, ((z & 0xFFFFFFFF) + 0.5) / 2**32
        first.append(math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v))
        second.append(math.sqrt(-2 * math.log(u)) * math.sin(2 * math.pi * v))
    np.testing.assert_allclose(row, np.float32(first + second[:3]), rtol=2e-7)


def test_noise_is_the_same_on_all_devices_by_construction():
    """It is made of operations whose results IEEE 754 or integers leave no choice of: no device's own logarithm or
    cosine, and nothing that may or may not round between a product and a sum."""
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name = str(function.overloadpacket).removeprefix("aten.").strip("_")
            assert name != "div" or isinstance(arguments[1], torch.Tensor)  # by a number a GPU takes its reciprocal
            seen.add(name)
            return function(*arguments, **(options or {}))

    with Watch():
        draw_noise(SEEDS, (4, 5, 3))
    exact = {"rshift", "lshift", "bitwise_and", "bitwise_xor", "eq", "rsub", "frexp"}
    rounded = {"add", "sub", "mul", "div", "sqrt", "to_copy"}
    moved = {"alias", "arange", "cat", "lift_fresh", "slice", "split", "unsqueeze", "view", "where"}
    assert seen <= exact | rounded | moved
    assert {"frexp", "sqrt", "where"} <= seen


def test_noise_to_the_bit():
    """The same operations on Python's floats, which are IEEE 754's."""

    def series(terms, x):
        result = terms[-1]
        for term in terms[-2::-1]:
            result = result * x + term
        return result

    found = draw_noise([42], (2000,)).flatten().tolist()
    wanted = [], []
    for i in range(1000):
        z = (i * 0x9E3779B97F4A7C15 + chained(42, 1)) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        mantissa, exponent = math.frexp(((z >> 32) + 0.5) / 2**32)
        x = (mantissa - math.sqrt(0.5)) / (mantissa + math.sqrt(0.5))
        log = (exponent - 0.5) * math.log(2) + series([1 / (2 * k + 1) for k in range(11)], x * x) * x * 2
        quarter = round(((z & 0xFFFFFFFF) + 0.5) / 2**30)
        x = ((z & 0xFFFFFFFF) + 0.5 - quarter * 2**30) * (math.pi / 2**31)
        cosine = series([(-1) ** k / math.factorial(2 * k) for k in range(9)], x * x)
        sine = series([(-1) ** k / math.factorial(2 * k + 1) for k in range(9)], x * x) * x
        turned = [(cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine)][quarter % 4]
        for numbers, factor in zip(wanted, turned, strict=True):
            numbers.append(math.sqrt(-2 * log) * factor)
    assert found == np.float32([*wanted[0], *wanted[1]]).tolist()


@pytest.mark.parametrize("low", [0, 1, 2**29 - 1, 2**29, 2**30, 3 * 2**29, 2**31, 5 * 2**29 - 1, 7 * 2**29, 2**32 - 1])
def test_noise_at_the_ends_of_its_logarithm_and_quarters(low):
    high = [0, 1, 2**31 - 1, 2**31, 3037000499, 3037000500, 2**32 - 2, 2**32 - 1]  # 2^31.5 between the middle two
    bits = torch.tensor([(one << 32 | low) - (2**64 if one >> 31 else 0) for one in high])
    angle = math.tau * (low + 0.5) / 2**32
    radius = torch.tensor([math.sqrt(-2 * math.log((one + 0.5) / 2**32)) for one in high], dtype=torch.float64)
    # Next to 1 the logarithm has an error of 1e-16 in 1e-10.
    for found, factor in zip(_normals(bits), (math.cos(angle), math.sin(angle)), strict=True):
        torch.testing.assert_close(found, radius * factor, rtol=2e-6, atol=1e-15)
    torch.testing.assert_close(_normals(bits)[0][:6], radius[:6] * math.cos(angle), rtol=1e-15, atol=1e-15)


def test_timesteps_of_a_seed_stay_what_they_were():
    """Stored errors are of them: by the second chain of the seed, and for a normal number the third one too."""
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    seeds = [*SEEDS, *range(100, 5000)]
    parts = [[((chained(seed, k) >> 11) + 0.5) / 2**53 for k in (2, 3)] for seed in seeds]
    numbers = draw_timesteps(scheduler, seeds).tolist()
    assert numbers == [int(1000 * u) for u, _ in parts]
    assert {0, 999} < set(numbers)
    given = dict(density="logit_normal", logit_mean=0.2, logit_std=0.7)
    gauss = [math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v) for u, v in parts]
    assert draw_timesteps(scheduler, seeds, **given).tolist() == [
        int(1000 / (1 + math.exp(-0.2 - 0.7 * z))) for z in gauss
    ]
    assert draw_timesteps(scheduler, seeds, density="mode", mode_scale=0.8).tolist() == [
        int(1000 * (1 - u - 0.8 * (math.cos(math.pi * u / 2) ** 2 - 1 + u))) for u, _ in parts
    ]


def test_noise_is_normal_and_independent():
    """Against the moments of a standard normal, five standard errors of each; a million numbers."""
    x = draw_noise(range(16), (65536,)).double()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 5 * math.sqrt(variance / n)
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:-1], x[1:]), (x[:, :32768], x[:, 32768:])):
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())
    shares = torch.special.ndtr(x.flatten()).mul(256).long().clamp(max=255).bincount(minlength=256)
    chi = ((shares - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_timesteps_have_diffusers_densities(density):
    """Kolmogorov and Smirnov's distance of 20,000 draws from as many of Diffusers': 0.0195 is exceeded by chance once
    in a thousand."""
    options = dict(logit_mean=0.3, logit_std=0.8, mode_scale=1.29)
    scheduler = FlowMatchEulerDiscreteScheduler()
    ours = draw_timesteps(scheduler, range(20000), density=density, **options)
    assert ours.dtype == torch.int64
    assert ours.min() >= 0
    assert ours.max() <= 999
    torch.manual_seed(0)
    theirs = (compute_density_for_timestep_sampling(density, 20000, **options) * 1000).long()
    edges = torch.arange(1000)
    distance = (torch.searchsorted(ours.sort()[0], edges) - torch.searchsorted(theirs.sort()[0], edges)).abs().max()
    assert distance / 20000 < 0.0195


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddpm_targets(prediction, zero_snr):
    scheduler = DDPMScheduler(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    latents, noise, steps = torch.randn(6, 4, 3, 3), torch.randn(3, 4, 3, 3), torch.tensor([0, 500, 999])
    noised = noise_pairs(scheduler, latents, noise, steps)
    for row in range(6):
        a = math.sqrt(scheduler.alphas_cumprod[steps[row % 3]].item())
        s = math.sqrt(1 - scheduler.alphas_cumprod[steps[row % 3]].item())
        x, n = latents[row], noise[row % 3]
        torch.testing.assert_close(noised.noisy[row], a * x + s * n, rtol=1e-5, atol=1e-5)
        want = {"epsilon": n, "v_prediction": a * n - s * x, "sample": x}[prediction]
        target = noised.target[row % len(noised.target)]
        torch.testing.assert_close(target, want, rtol=1e-5, atol=1e-5)
    assert len(noised.target) == (3 if prediction == "epsilon" else 6)
    assert noised.timesteps.tolist() == steps.tolist() * 2


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", [DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler])
def test_a_samplers_schedule_is_that_of_training(kind, prediction, zero_snr):
    """SDXL's own scheduler is Euler's, whose add_noise is of latents in another scale. DDPM's is the judge, to the
    bit."""
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction)
    scheduler = kind(**betas, **({} if kind is PNDMScheduler else {"rescale_betas_zero_snr": zero_snr}))
    judge = DDPMScheduler(**betas, rescale_betas_zero_snr=zero_snr and kind is not PNDMScheduler)
    if zero_snr and kind is not PNDMScheduler:  # DDPM's last is 0, those of samplers the smallest number of float16
        judge.alphas_cumprod[-1] = scheduler.alphas_cumprod[-1]
    latents, noise, steps = torch.randn(6, 4, 3, 3), torch.randn(3, 4, 3, 3), torch.tensor([0, 500, 999])
    noised = noise_pairs(scheduler, latents, noise, steps)
    both, at = noise.repeat(2, 1, 1, 1), steps.repeat(2)
    assert torch.equal(noised.noisy, judge.add_noise(latents, both, at))
    target = judge.get_velocity(latents, both, at) if prediction == "v_prediction" else noise
    assert torch.equal(noised.target, target)
    assert torch.equal(noised.timesteps, at)
    scheduler.set_timesteps(7)
    assert torch.equal(noise_pairs(scheduler, latents, noise, steps).noisy, noised.noisy)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    latents, noise, numbers = torch.randn(4, 2, 3), torch.randn(2, 2, 3), torch.tensor([0, 600])
    noised = noise_pairs(scheduler, latents, noise, numbers)
    for row in range(4):
        t = 1 - numbers[row % 2].item() / 1000
        sigma = shift * t / (1 + (shift - 1) * t)
        want = (1 - sigma) * latents[row] + sigma * noise[row % 2]
        torch.testing.assert_close(noised.noisy[row], want, rtol=1e-5, atol=1e-6)
        assert torch.equal(noised.target[row], noise[row % 2] - latents[row])
        assert noised.timesteps[row].item() == pytest.approx(1000 * sigma, rel=1e-5)


def test_half_precision_latents_are_noised_in_float32():
    scheduler = DDPMScheduler()
    latents, noise, steps = torch.randn(4, 1, 8), torch.randn(2, 1, 8), torch.tensor([10, 20])
    half = noise_pairs(scheduler, latents.bfloat16(), noise, steps)
    whole = noise_pairs(scheduler, latents.bfloat16().float(), noise, steps)
    assert torch.equal(half.noisy, whole.noisy.bfloat16())
    assert torch.equal(half.target, whole.target)
    assert half.target.dtype == torch.float32


def test_bad_arguments_are_named():
    scheduler, x, n, t = DDPMScheduler(), torch.randn(4, 3), torch.randn(2, 3), torch.tensor([1, 2])
    for arguments, message in (
        ((x[:3], n, t), r"latents is torch.float32 of shape \(3, 3\); expected \(2B"),
        ((x, n[:1], t), r"noise has shape \(1, 3\); expected \(2, 3\), one per pair"),
        ((x, n, t.float()), r"timesteps is torch.float32 \(2,\); expected int64 \(2,\)"),
        ((x, n, t - 2), r"timesteps is \[-1, 0\]; expected numbers from 0 to 999"),
        ((x, n, t + 998), r"timesteps is \[999, 1000\]; expected numbers from 0 to 999"),
    ):
        with pytest.raises(ValueError, match=message):
            noise_pairs(scheduler, *arguments)
    with pytest.raises(ValueError, match="density is 'normal'"):
        draw_timesteps(scheduler, [1], density="normal")
    flow = FlowMatchEulerDiscreteScheduler()
    for steps in (10, 1000):
        flow.set_timesteps(steps)
        with pytest.raises(ValueError, match=f"scheduler has {steps} timesteps and .*; expected its 1000 of training"):
            noise_pairs(flow, x, n, t)
    with pytest.raises(TypeError, match="scheduler is a EDMEulerScheduler; expected one with alphas_cumprod"):
        noise_pairs(EDMEulerScheduler(), x, n, t)
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ValueError, match=r"'flow_prediction'; .* for flow matching a FlowMatchEulerDiscreteScheduler"):
        noise_pairs(unipc, x, n, t)
    heun = FlowMatchHeunDiscreteScheduler(shift=3.0)
    assert torch.equal(noise_pairs(heun, x, n, t).noisy, noise_pairs(type(flow)(shift=3.0), x, n, t).noisy)
    sampling = DDIMScheduler()
    sampling.set_timesteps(10)
    assert noise_pairs(sampling, x, n, t).timesteps.tolist() == [1, 2, 1, 2]
