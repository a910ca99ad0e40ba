// The only file that knows Python. Tensors come as addresses: the extension does not link against torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <libdeflate.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <jpeglib.h>

#include "decode.hpp"
#include "foreign.hpp"
#include "frame.hpp"
#include "loss.hpp"
#include "pool.hpp"
#include "simd.hpp"

namespace py = pybind11;

namespace {

// Like py::gil_scoped_release, whose noexcept destructor would call std::terminate: Python unwinds a daemon thread that
// returns after finalisation through this destructor.
class ReleasedGil {
public:
    ReleasedGil() : state_(PyEval_SaveThread()) {}
    ~ReleasedGil() noexcept(false) { PyEval_RestoreThread(state_); }
    ReleasedGil(const ReleasedGil&) = delete;

private:
    PyThreadState* state_;
};

unsigned long main_thread = 0;  // Python's name for it; set when the module is imported

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

    std::vector<polydpo::Image> images() const {
        std::vector<polydpo::Image> result;
        for (const Py_buffer& view : views_) {
            result.push_back({static_cast<const std::uint8_t*>(view.buf), static_cast<std::size_t>(view.len)});
        }
        return result;
    }

private:
    std::vector<Py_buffer> views_;
};

// One row of `draws`: 0 or 1 whether the crop is centred, its two random numbers, 0 or 1 whether it is mirrored.
using DrawRow = std::array<std::uint32_t, 4>;
// An image that is pixels already: its row of the batch, height, width, EXIF orientation.
using RawRow = std::array<std::int64_t, 4>;

// The caller vouches for `out`: 2B * 3 * height * width elements of the dtype; dtype -1 is planes, 2B * height * 3/2 *
// width bytes. Returns the geometry of each sample, (2B, 4) int64 (oriented height and width, crop top and left), the
// failures as (sample, reason), and the damage that was let pass, likewise.
py::tuple decode_pairs(const py::sequence& win, const py::sequence& lose, const std::vector<RawRow>& raw,
                       const std::vector<DrawRow>& draws, std::uintptr_t out, int dtype,
                       const std::array<float, 6>& normal, const std::array<std::uint8_t, 3>& background,
                       const std::array<int, 2>& size, int resize, int interpolation, bool apply_orientation,
                       bool strict, const std::array<std::int64_t, 5>& limits, int threads, int jpeg) {
    Buffers buffers;
    buffers.add(win, "win");
    buffers.add(lose, "lose");
    std::vector<polydpo::Image> images = buffers.images();
    if (images.size() != 2 * draws.size()) throw py::value_error("win and lose do not hold B images each");
    for (const auto& [row, height, width, orientation] : raw) {
        polydpo::Image& image = images.at(static_cast<std::size_t>(row));
        image.raw = {static_cast<int>(height), static_cast<int>(width)};
        image.orientation = static_cast<int>(orientation);
        if (image.bytes != static_cast<std::size_t>(4 * height * width)) throw py::value_error("raw pixels are short");
    }
    std::vector<polydpo::Draw> drawn;
    for (const auto& [centre, top, left, flipped] : draws) drawn.push_back({centre != 0, top, left, flipped != 0});
    const polydpo::Options options{{size[0], size[1]},
                                   static_cast<polydpo::Resize>(resize),
                                   static_cast<polydpo::Interpolation>(interpolation),
                                   dtype < 0,
                                   static_cast<polydpo::Dtype>(std::max(dtype, 0)),
                                   {{normal[0], normal[1], normal[2]}, {normal[3], normal[4], normal[5]}},
                                   {background[0], background[1], background[2]},
                                   apply_orientation,
                                   strict,
                                   {limits[0], limits[1], limits[2], static_cast<int>(limits[3]), limits[4]},
                                   threads,
                                   static_cast<polydpo::JpegDecoder>(jpeg)};
    bool interrupted = false;
    // Only the main thread hears of signals; and whoever asks for the lock while Python ends does not come back, though
    // other threads are still at work on what lies on this one's stack.
    const bool listens = PyThread_get_thread_ident() == main_thread;
    const auto stop = [&] {
        if (!listens) return false;
        const py::gil_scoped_acquire acquire;
        return interrupted = PyErr_CheckSignals() != 0;
    };
    std::vector<polydpo::Decoded> results;
    {
        const ReleasedGil released;
        results = polydpo::decode_batch(images, drawn, options, reinterpret_cast<void*>(out), stop);
    }
    if (interrupted) throw py::error_already_set();
    py::array_t<std::int64_t> geometry({images.size(), std::size_t{4}});
    auto view = geometry.mutable_unchecked<2>();
    std::vector<std::pair<std::size_t, std::string>> failures, damages;
    for (std::size_t i = 0; i < results.size(); ++i) {
        const polydpo::Decoded& result = results[i];
        view(i, 0) = result.original.height;
        view(i, 1) = result.original.width;
        view(i, 2) = result.top;
        view(i, 3) = result.left;
        if (!result.error.empty()) failures.emplace_back(i, result.error);
        if (result.error.empty() && !result.damage.empty()) damages.emplace_back(i, result.damage);
    }
    return py::make_tuple(geometry, failures, damages);
}

// What a foreign decoder is told of an image: height and width as stored; of the whole resized image; top, left, height and
// width of the crop in it; top and left of the crop in the output; whether it is transposed, its rows reversed, its columns
// reversed; the corner that is reported, top and left; and whether a bicubic resize goes down first.
using PlanRow = std::array<int, 16>;

PlanRow plan_row(const polydpo::Size& source, const polydpo::Geometry& g) {
    return {source.height, source.width, g.stored.height, g.stored.width, g.crop.top,
            g.crop.left,   g.crop.height, g.crop.width,   g.inner.top,    g.inner.left,
            g.transposed,  g.row_reversed, g.col_reversed, g.top,         g.left,
            g.down_first};
}

// Image i with draws[i % draws.size()]. Zeros where our own decoder is to be asked.
std::vector<PlanRow> foreign_plans(const py::sequence& images, const std::vector<DrawRow>& draws,
                                   const std::array<int, 2>& size, int resize, int interpolation,
                                   bool apply_orientation, const std::array<std::int64_t, 5>& limits) {
    Buffers buffers;
    buffers.add(images, "images");
    const std::vector<polydpo::Image> views = buffers.images();
    if (draws.empty()) throw py::value_error("draws is empty");
    std::vector<PlanRow> rows(views.size());
    const ReleasedGil released;
    for (std::size_t i = 0; i < views.size(); ++i) {
        const auto& [centre, top, left, flipped] = draws[i % draws.size()];
        const auto found = polydpo::foreign_plan(
            views[i], {centre != 0, top, left, flipped != 0}, {size[0], size[1]}, static_cast<polydpo::Resize>(resize),
            static_cast<polydpo::Interpolation>(interpolation), apply_orientation,
            {limits[0], limits[1], limits[2], static_cast<int>(limits[3]), limits[4]});
        if (found) rows[i] = plan_row(found->source, found->geometry);
    }
    return rows;
}

// Of an upright frame. Throws RuntimeError where it does not fit.
PlanRow plan(const std::array<int, 2>& source, const DrawRow& draw, const std::array<int, 2>& size, int resize) {
    const polydpo::Size stored{source[0], source[1]};
    return plan_row(stored, polydpo::plan(stored, 1, {size[0], size[1]}, static_cast<polydpo::Resize>(resize),
                                          {draw[0] != 0, draw[1], draw[2], draw[3] != 0}));
}

// The filter of one axis, for the outputs [offset, offset + length): the first input of each, (length,), and the weights from
// there on, (length, taps), those beyond its own 0.
py::tuple resize_filter(int interpolation, int source, int resized, int offset, int length) {
    if (source < 1 || resized < 1 || offset < 0 || length < 1 || length > resized - offset) {
        throw py::value_error("the outputs are none of the axis");
    }
    const auto filter =
        polydpo::make_filter(static_cast<polydpo::Interpolation>(interpolation), source, resized, offset, length);
    py::array_t<int> first(length, filter.first.data());
    return py::make_tuple(first, py::array_t<float>({length, filter.taps}, filter.weights.data()));
}

// Stores the frames of one clip, one by one, all under the same geometry. The caller vouches for `out`: 3 planes of
// height * width elements of the dtype, `plane` elements apart; or, if `planes`, height * 3/2 * width bytes, and the dtype is
// not looked at.
class FrameStore {
public:
    FrameStore(const DrawRow& draw, int dtype, const std::array<float, 6>& normal,
               const std::array<std::uint8_t, 3>& background, const std::array<int, 2>& size, int resize,
               int interpolation, bool apply_orientation, std::int64_t memory, bool planes)
        : draw_{draw[0] != 0, draw[1], draw[2], draw[3] != 0},
          options_{{size[0], size[1]},
                   static_cast<polydpo::Resize>(resize),
                   static_cast<polydpo::Interpolation>(interpolation),
                   planes,
                   static_cast<polydpo::Dtype>(planes ? 0 : dtype),
                   {{normal[0], normal[1], normal[2]}, {normal[3], normal[4], normal[5]}},
                   {background[0], background[1], background[2]},
                   apply_orientation,
                   true,
                   {0, 0, memory, 0},
                   1},
          finish_(options_.dtype, options_.normal, 3 * std::int64_t{size[0]} * size[1] >= large_frame) {
        if (planes && (size[0] % 2 || size[1] % 2)) throw py::value_error("size is odd; expected even sides for planes");
    }

    // planes: Y, Cb, Cr (or G, B, R) as buffers; strides: in bytes; form: height, width, depth, and the shifts of the
    // chroma's width and height; siting: of the chroma; shown: height and width with square pixels, before the frame is
    // turned, or zeros for the frame's own. Returns oriented height and width as shown, crop top and left. Throws
    // RuntimeError.
    std::array<int, 4> store(const py::sequence& planes, const std::array<std::ptrdiff_t, 3>& strides,
                             const std::array<int, 5>& form, bool full_range, int matrix, int orientation,
                             std::uintptr_t out, std::size_t plane, const std::array<int, 2>& shown, int siting) const {
        Buffers buffers;
        buffers.add(planes, "planes");
        const std::vector<polydpo::Image> views = buffers.images();
        if (views.size() != 3) throw py::value_error("planes are not three");
        const auto& [height, width, depth, shift_x, shift_y] = form;
        polydpo::Frame frame{{}, {}, {height, width}, depth, shift_x, shift_y, full_range,
                             static_cast<polydpo::Matrix>(matrix), orientation, {height, width},
                             static_cast<polydpo::Siting>(siting)};
        if (shown[0] > 0 && shown[1] > 0) frame.shown = {shown[0], shown[1]};
        for (std::size_t i = 0; i < 3; ++i) {
            const std::ptrdiff_t rows = i ? (height + shift_y) >> shift_y : height;
            const std::ptrdiff_t bytes = (i ? (width + shift_x) >> shift_x : width) * (depth > 8 ? 2 : 1);
            if (strides[i] < bytes || static_cast<std::ptrdiff_t>(views[i].bytes) < (rows - 1) * strides[i] + bytes) {
                throw py::value_error("a plane is smaller than its frame");
            }
            frame.planes[i] = views[i].data;
            frame.strides[i] = strides[i];
        }
        polydpo::Decoded result;
        {
            const ReleasedGil released;
            polydpo::FrameReader reader(frame);
            polydpo::render(reader, draw_, options_, finish_, reinterpret_cast<void*>(out), plane, result);
            finish_.settle();
        }
        return {result.original.height, result.original.width, result.top, result.left};
    }

private:
    static constexpr std::int64_t large_frame = 1 << 20;  // elements; of smaller ones a clip may stay in the caches

    polydpo::Draw draw_;
    polydpo::Options options_;
    polydpo::Finish finish_;
};

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
    double total = 0, metrics[polydpo::metric_count];
    const ReleasedGil released;
    polydpo::pair_loss(batch, objective, table, &total, metrics);
    if (objective.head == nullptr) return;
    const auto store = [&](auto* loss, auto* metric) {
        using Value = std::remove_pointer_t<decltype(loss)>;
        if (objective.reduction == polydpo::Objective::none) {
            for (std::int64_t i = 0; i < batch.pairs; ++i) loss[i] = static_cast<Value>(table[polydpo::pair_columns * i]);
        } else {
            *loss = static_cast<Value>(total);
        }
        for (int k = 0; k < polydpo::metric_count; ++k) metric[k] = static_cast<Value>(metrics[k]);
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
    const ReleasedGil released;
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
        if (!pred || !ref || !target) {
            throw py::value_error("a tensor has no memory; expected one whose storage is there");
        }
        run_loss(batch(pred, ref, target, threads), objective_, loss, metrics, table);
    }

    void gradient(std::uintptr_t pred, std::uintptr_t target, std::uintptr_t table, std::uintptr_t grad_loss,
                  std::int64_t grad_loss_stride, std::uintptr_t grad, int threads) const {
        const polydpo::Batch tensors = batch(pred, 0, target, threads);
        const auto* coefficients = reinterpret_cast<const double*>(table) + polydpo::grad_win;
        const polydpo::Arms to = at(grad, 3);
        const ReleasedGil released;
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
    return py::dict("compiler"_a = __VERSION__, "simd"_a = polydpo::simd_level(), "jpeg"_a = jpeg,
                    "png"_a = "libdeflate " LIBDEFLATE_VERSION_STRING);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The C++ half of polydpo_fast: decode_pairs, and the losses on a CPU. Not for direct use.";
    main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
    module.def("decode_pairs", &decode_pairs, py::arg("win"), py::arg("lose"), py::kw_only(), py::arg("raw"),
               py::arg("draws"), py::arg("out"), py::arg("dtype"), py::arg("normal"), py::arg("background"),
               py::arg("size"), py::arg("resize"), py::arg("interpolation"), py::arg("apply_orientation"),
               py::arg("strict"), py::arg("limits"), py::arg("threads"), py::arg("jpeg") = 0);
    module.def("foreign_plans", &foreign_plans, py::arg("images"), py::kw_only(), py::arg("draws"), py::arg("size"),
               py::arg("resize"), py::arg("interpolation"), py::arg("apply_orientation"), py::arg("limits"));
    module.def("resize_filter", &resize_filter, py::arg("interpolation"), py::arg("source"), py::arg("resized"),
               py::arg("offset"), py::arg("length"));
    module.def("plan", &plan, py::arg("source"), py::kw_only(), py::arg("draw"), py::arg("size"), py::arg("resize"));
    py::class_<FrameStore>(module, "FrameStore")
        .def(py::init<const DrawRow&, int, const std::array<float, 6>&, const std::array<std::uint8_t, 3>&,
                      const std::array<int, 2>&, int, int, bool, std::int64_t, bool>(),
             py::kw_only(), py::arg("draw"), py::arg("dtype"), py::arg("normal"), py::arg("background"),
             py::arg("size"), py::arg("resize"), py::arg("interpolation"), py::arg("apply_orientation"),
             py::arg("memory"), py::arg("planes") = false)
        .def("store", &FrameStore::store, py::arg("planes"), py::arg("strides"), py::arg("form"), py::arg("full_range"),
             py::arg("matrix"), py::arg("orientation"), py::arg("out"), py::arg("plane"),
             py::arg("shown") = std::array<int, 2>{0, 0}, py::arg("siting") = 0);
    py::class_<polydpo::Head>(module, "Head").def(py::init(&make_head));
    py::class_<BoundLoss>(module, "BoundLoss")
        .def(py::init<const std::array<std::array<std::int64_t, 3>, 4>&, const std::array<std::int64_t, 3>&,
                      const polydpo::Head&, const std::array<double, 9>&, int>())
        .def("errors", &BoundLoss::errors)
        .def("gradient", &BoundLoss::gradient);
    module.def("set_openmp", [](std::uintptr_t entry) {
        polydpo::set_openmp(reinterpret_cast<polydpo::GompParallel>(entry));
    });
    module.def("pair_loss", &pair_loss);
    module.def("pair_gradient", &pair_gradient);
    module.def("build_info", &build_info);
}
