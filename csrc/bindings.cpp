// The only file that knows Python. Tensors come as addresses: the extension does not link against torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <png.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "decode.hpp"
#include "loss.hpp"
#include "pool.hpp"
#include "simd.hpp"

namespace py = pybind11;

namespace {

// The buffers of one call. They keep the exporting objects locked (a bytearray cannot be resized) until the end.
class Buffers {
public:
    ~Buffers() {
        for (Py_buffer& view : views_) PyBuffer_Release(&view);
    }

    void add(const py::sequence& images, const char* arm) {
        const std::size_t count = py::len(images);
        views_.reserve(views_.size() + count);
        for (std::size_t i = 0; i < count; ++i) {
            const py::object image = images[i];
            Py_buffer view;
            if (PyObject_GetBuffer(image.ptr(), &view, PyBUF_SIMPLE) != 0) {
                PyErr_Clear();
                throw py::type_error(std::string(arm) + "[" + std::to_string(i) + "] is a " +
                                     Py_TYPE(image.ptr())->tp_name +
                                     "; expected a contiguous bytes-like object (bytes, memoryview, ...)");
            }
            views_.push_back(view);
        }
    }

    std::vector<polydpo::Bytes> bytes() const {
        std::vector<polydpo::Bytes> result;
        for (const Py_buffer& view : views_) {
            result.push_back({static_cast<const std::uint8_t*>(view.buf), static_cast<std::size_t>(view.len)});
        }
        return result;
    }

private:
    std::vector<Py_buffer> views_;
};

// The caller vouches for `out`: 2B * 3 * height * width elements of the dtype. Returns the geometry of each sample,
// (2B, 4) int64 (original height and width, crop top and left), and the failures as (sample, reason).
py::tuple decode_pairs(const py::sequence& win, const py::sequence& lose, std::size_t pairs, std::uintptr_t out, int dtype, int height,
                       int width, bool cover, bool strict, std::int64_t max_pixels, std::int64_t max_bytes,
                       int max_scans, int threads) {
    Buffers buffers;
    buffers.add(win, "win");
    buffers.add(lose, "lose");
    const std::vector<polydpo::Bytes> images = buffers.bytes();
    if (images.size() != 2 * pairs) throw py::value_error("win and lose do not hold B images each");
    const polydpo::Options options{{height, width},
                                   cover ? polydpo::Resize::cover : polydpo::Resize::none,
                                   static_cast<polydpo::Dtype>(dtype),
                                   strict,
                                   {max_pixels, max_bytes, max_scans},
                                   threads};
    std::vector<polydpo::Decoded> results;
    {
        py::gil_scoped_release release;
        results = polydpo::decode_batch(images, options, reinterpret_cast<void*>(out));
    }
    py::array_t<std::int64_t> geometry({images.size(), std::size_t{4}});
    auto view = geometry.mutable_unchecked<2>();
    std::vector<std::pair<std::size_t, std::string>> failures;
    for (std::size_t i = 0; i < results.size(); ++i) {
        const polydpo::Decoded& result = results[i];
        view(i, 0) = result.original.height;
        view(i, 1) = result.original.width;
        view(i, 2) = result.top;
        view(i, 3) = result.left;
        if (!result.error.empty()) failures.emplace_back(i, result.error);
    }
    return py::make_tuple(geometry, failures);
}

using Address = std::array<std::int64_t, 4>;  // winners, losers, dtype, stride in elements

polydpo::Arms arms_of(const Address& at) {
    return {reinterpret_cast<const void*>(at[0]), reinterpret_cast<const void*>(at[1]),
            static_cast<polydpo::Float>(at[2]), at[3]};
}

// sizes: pairs, elements per sample, whether to compute in float64, threads.
polydpo::Batch batch_of(const Address& pred, const Address& ref, const Address& target,
                        const std::array<std::int64_t, 2>& mask, const std::array<std::int64_t, 4>& sizes) {
    return {sizes[0],       sizes[1],
            arms_of(pred),  arms_of(ref),
            arms_of(target), reinterpret_cast<const std::uint8_t*>(mask[0]),
            mask[1],        sizes[2] != 0,
            static_cast<int>(sizes[3])};
}

polydpo::Head make_head(const std::vector<std::tuple<int, int, int, double>>& program, int loss, int slope) {
    std::vector<polydpo::Instruction> instructions;
    for (const auto& [operation, left, right, constant] : program) {
        instructions.push_back({static_cast<polydpo::Operation>(operation), left, right, constant});
    }
    return polydpo::Head(std::move(instructions), loss, slope);
}

polydpo::Objective objective_of(const polydpo::Head* head, const std::array<double, 9>& parameters, int reduction) {
    polydpo::Objective objective{};
    objective.head = head;
    objective.beta_value = parameters[0];
    std::copy(parameters.begin() + 1, parameters.begin() + 5, objective.alphas);
    objective.keep = parameters[5];
    objective.flip = parameters[6];
    objective.margin = parameters[7];
    objective.sft_weight = parameters[8];
    objective.reduction = static_cast<decltype(objective.reduction)>(reduction);
    return objective;
}

// The errors' pass, and loss and metrics in the dtype of their tensors: float64 if the batch is computed in it, else
// float32.
void run_loss(const polydpo::Batch& batch, const polydpo::Objective& objective, std::uintptr_t loss_at,
              std::uintptr_t metrics_at, std::uintptr_t table_at) {
    auto* table = reinterpret_cast<double*>(table_at);
    double total = 0, metrics[12];
    const py::gil_scoped_release release;
    polydpo::pair_loss(batch, objective, table, &total, metrics);
    if (objective.head == nullptr) return;
    const auto store = [&](auto* loss, auto* metric) {
        using Value = std::remove_pointer_t<decltype(loss)>;
        if (objective.reduction == polydpo::Objective::none) {
            for (std::int64_t i = 0; i < batch.pairs; ++i) loss[i] = static_cast<Value>(table[polydpo::pair_columns * i]);
        } else {
            *loss = static_cast<Value>(total);
        }
        for (int k = 0; k < 12; ++k) metric[k] = static_cast<Value>(metrics[k]);
    };
    if (batch.accumulate_in_double) {
        store(reinterpret_cast<double*>(loss_at), reinterpret_cast<double*>(metrics_at));
    } else {
        store(reinterpret_cast<float*>(loss_at), reinterpret_cast<float*>(metrics_at));
    }
}

// The caller vouches for all addresses. tensors: ref_error (2, B), beta, alpha, weight (B,) as float64, or 0.
// out: loss, metrics, table.
void pair_loss(const Address& pred, const Address& ref, const Address& target, const std::array<std::int64_t, 2>& mask,
               const std::array<std::int64_t, 4>& sizes, const polydpo::Head* head,
               const std::array<std::int64_t, 4>& tensors, const std::array<double, 9>& parameters, int reduction,
               const std::array<std::uintptr_t, 3>& out) {
    const polydpo::Batch batch = batch_of(pred, ref, target, mask, sizes);
    const auto doubles = [&](int i) { return reinterpret_cast<const double*>(tensors[i]); };
    polydpo::Objective objective = objective_of(head, parameters, reduction);
    objective.ref_error_win = doubles(0);
    objective.ref_error_lose = doubles(0) ? doubles(0) + batch.pairs : nullptr;
    objective.beta = doubles(1);
    objective.alpha = doubles(2);
    objective.weight = doubles(3);
    run_loss(batch, objective, out[0], out[1], out[2]);
}

void pair_gradient(const Address& pred, const Address& target, const std::array<std::int64_t, 2>& mask,
                   const std::array<std::int64_t, 4>& sizes, const std::array<std::int64_t, 2>& coefficients,
                   const std::array<std::int64_t, 3>& grad_loss, const Address& grad) {
    // coefficients: address, stride; grad_loss: address, whether float64 (else float32), stride.
    const polydpo::Batch batch = batch_of(pred, {}, target, mask, sizes);
    py::gil_scoped_release release;
    polydpo::pair_gradient(batch, reinterpret_cast<const double*>(coefficients[0]), coefficients[1],
                           reinterpret_cast<const void*>(grad_loss[0]), grad_loss[1] != 0, grad_loss[2],
                           reinterpret_cast<void*>(grad[0]), reinterpret_cast<void*>(grad[1]), grad[3]);
}

// Both for the tensors of one signature: only addresses are left to be given.
class BoundLoss {
public:
    // arms, of pred, ref, target and gradient: from the winners to the losers in bytes, dtype, stride in elements.
    // sizes: pairs, elements per sample, whether to compute in float64.
    BoundLoss(const std::array<std::array<std::int64_t, 3>, 4>& arms, const std::array<std::int64_t, 3>& sizes,
              const polydpo::Head& head, const std::array<double, 9>& parameters, int reduction)
        : arms_(arms), sizes_(sizes), head_(head), objective_(objective_of(&head_, parameters, reduction)) {}
    BoundLoss(const BoundLoss&) = delete;  // objective_ points into it

    void errors(std::uintptr_t pred, std::uintptr_t ref, std::uintptr_t target, std::uintptr_t loss,
                std::uintptr_t metrics, std::uintptr_t table, int threads) const {
        run_loss(batch(pred, ref, target, threads), objective_, loss, metrics, table);
    }

    void gradient(std::uintptr_t pred, std::uintptr_t target, std::uintptr_t table, std::uintptr_t grad_loss,
                  std::int64_t grad_loss_stride, std::uintptr_t grad, int threads) const {
        const polydpo::Batch tensors = batch(pred, 0, target, threads);
        const auto* coefficients = reinterpret_cast<const double*>(table) + polydpo::pair_columns - 2;
        const polydpo::Arms to = at(grad, 3);
        const py::gil_scoped_release release;
        polydpo::pair_gradient(tensors, coefficients, polydpo::pair_columns, reinterpret_cast<const void*>(grad_loss),
                               tensors.accumulate_in_double, grad_loss_stride, const_cast<void*>(to.win),
                               const_cast<void*>(to.lose), to.stride);
    }

private:
    polydpo::Arms at(std::uintptr_t base, int tensor) const {
        const auto& [lose, dtype, stride] = arms_[tensor];
        return {reinterpret_cast<const void*>(base), reinterpret_cast<const void*>(base + lose),
                static_cast<polydpo::Float>(dtype), stride};
    }

    polydpo::Batch batch(std::uintptr_t pred, std::uintptr_t ref, std::uintptr_t target, int threads) const {
        return {sizes_[0], sizes_[1], at(pred, 0), at(ref, 1), at(target, 2), nullptr, 0, sizes_[2] != 0, threads};
    }

    std::array<std::array<std::int64_t, 3>, 4> arms_;
    std::array<std::int64_t, 3> sizes_;
    polydpo::Head head_;
    polydpo::Objective objective_;
};

#define POLYDPO_TEXT_(x) #x
#define POLYDPO_TEXT(x) POLYDPO_TEXT_(x)

py::dict build_info() {
    using namespace py::literals;
#ifdef LIBJPEG_TURBO_VERSION
    const char* jpeg = "libjpeg-turbo " POLYDPO_TEXT(LIBJPEG_TURBO_VERSION);
#else
    const char* jpeg = "libjpeg API " POLYDPO_TEXT(JPEG_LIB_VERSION);
#endif
    const std::string png = std::string("libpng ") + png_get_libpng_ver(nullptr);
    return py::dict("compiler"_a = __VERSION__, "simd"_a = polydpo::simd_level(), "jpeg"_a = jpeg, "png"_a = png);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The C++ half of polydpo_fast: decode_pairs, and the losses on a CPU. Not for direct use.";
    module.def("decode_pairs", &decode_pairs, py::arg("win"), py::arg("lose"), py::kw_only(), py::arg("pairs"), py::arg("out"),
               py::arg("dtype"), py::arg("height"), py::arg("width"), py::arg("cover"), py::arg("strict"),
               py::arg("max_pixels"), py::arg("max_bytes"), py::arg("max_scans"), py::arg("threads"));
    py::class_<polydpo::Head>(module, "Head").def(py::init(&make_head));
    py::class_<BoundLoss>(module, "BoundLoss")
        .def(py::init<const std::array<std::array<std::int64_t, 3>, 4>&, const std::array<std::int64_t, 3>&,
                      const polydpo::Head&, const std::array<double, 9>&, int>())
        .def("errors", &BoundLoss::errors)
        .def("gradient", &BoundLoss::gradient);
    module.def("set_team", [](std::uintptr_t entry) { polydpo::set_team(reinterpret_cast<polydpo::GompParallel>(entry)); });
    module.def("pair_loss", &pair_loss);
    module.def("pair_gradient", &pair_gradient);
    module.def("build_info", &build_info);
}
