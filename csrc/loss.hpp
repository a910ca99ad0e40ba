// The preference losses on the CPU: the same two passes as the GPU kernels (kernels/pair_loss.py).
#pragma once

#include <cstdint>

#include "head.hpp"

namespace polydpo {

// One input of a batch of pairs: where each arm begins, its dtype, and the distance from one pair to the next in
// elements. Within a sample the elements are dense, in one order common to all tensors of a call.
struct Arms {
    const void* win;
    const void* lose;
    Float dtype;
    std::int64_t stride;

    const void* of(int arm) const { return arm == 0 ? win : lose; }

    // Where an element of a pair's arm is; `known` is the dtype once more, where the compiler knows it.
    POLYDPO_INLINE const char* from(int arm, std::int64_t pair, std::int64_t at, Float known) const {
        return static_cast<const char*>(of(arm)) + static_cast<std::size_t>(pair * stride + at) * size_of(known);
    }
};

struct Batch {
    std::int64_t pairs, numel;  // numel: elements per sample
    Arms pred, ref, target;     // ref.win is null where there is no reference prediction
    const std::uint8_t* mask;   // 1 where an element counts; null: everywhere
    std::int64_t mask_stride;   // 0: one for all pairs
    bool accumulate_in_double;  // float64 arithmetic: where an input is float64
    int threads;
};

struct Objective {
    const Head* head;                              // null: errors only
    const double *ref_error_win, *ref_error_lose;  // (B,), or null
    const double *beta, *alpha, *weight;           // (B,) each, or null: then the values below hold
    double beta_value, alphas[4], keep, flip, margin, sft_weight;
    enum { mean, sum, none } reduction;
};

// The columns of the table of pairs, a row of doubles for each: polydpo_fast/layout.py has the same. From
// implicit_accuracy to model_mse_lose they are the metrics of polydpo_fast/metrics.py.
enum Column : int {
    loss_value,
    implicit_accuracy,
    reward_win,
    reward_lose,
    reward_margin,
    logit_mean,
    p_mean,
    saturated,
    false_success,
    ref_mse_win,
    ref_mse_lose,
    model_mse_win,
    model_mse_lose,
    excess_win,
    excess_lose,
    elements,
    grad_win,
    grad_lose,
    pair_columns
};
constexpr int metric_count = model_mse_lose;

// `total` is the reduced loss, `metrics` are the means over the pairs. Without a head only the columns from
// model_mse_win to elements are written.
void pair_loss(const Batch& batch, const Objective& objective, double* pairs, double* total, double* metrics);

// grad = grad_loss * coefficient * (pred - target), of pred's dtype, 0 where masked. grad_loss_stride is 0 for one
// value for all pairs. Both coefficients of a pair are adjacent. batch.ref is not used.
void pair_gradient(const Batch& batch, const double* coefficients, std::int64_t coefficients_stride,
                   const void* grad_loss, bool grad_loss_is_double, std::int64_t grad_loss_stride, void* grad_of_win,
                   void* grad_of_lose, std::int64_t grad_stride);

}  // namespace polydpo
