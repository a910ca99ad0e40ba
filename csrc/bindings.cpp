// The only file that knows Python. Tensors come as addresses: the extension does not link against torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <libdeflate.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
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

// ---------------------------------------------------------------------------------------------- decoding
// What belongs together comes as one object whose attributes have the names that they have here.

// An argument that is one of a few names, or None.
template <class Value>
Value named(const py::handle& given, const char* argument, const std::vector<std::pair<const char*, Value>>& known) {
    const auto text = py::str(given).cast<std::string>();
    for (const auto& [name, value] : known) {
        if (text == name) return value;
    }
    throw py::value_error(std::string(argument) + " is '" + text + "', which is none of those that are known");
}

polydpo::Resize resize_of(const py::handle& given) {
    using polydpo::Resize;
    return named<Resize>(
        given, "resize",
        {{"None", Resize::none}, {"cover", Resize::cover}, {"contain", Resize::contain}, {"stretch", Resize::stretch}});
}

polydpo::Interpolation interpolation_of(const py::handle& given) {
    using polydpo::Interpolation;
    return named<Interpolation>(given, "interpolation",
                                {{"bilinear", Interpolation::bilinear}, {"bicubic", Interpolation::bicubic}});
}

polydpo::Dtype dtype_of(const py::handle& given) {
    using polydpo::Dtype;
    return named<Dtype>(given, "dtype",
                        {{"uint8", Dtype::uint8},
                         {"bfloat16", Dtype::bfloat16},
                         {"float16", Dtype::float16},
                         {"float32", Dtype::float32},
                         {"yuv420", Dtype::uint8}});
}

polydpo::JpegDecoder jpeg_decoder_of(const py::handle& given) {
    using polydpo::JpegDecoder;
    return named<JpegDecoder>(
        given, "jpeg", {{"either", JpegDecoder::either}, {"libjpeg", JpegDecoder::libjpeg}, {"own", JpegDecoder::own}});
}

polydpo::Matrix matrix_of(const py::handle& given) {
    using polydpo::Matrix;
    return named<Matrix>(given, "matrix",
                         {{"bt601", Matrix::bt601},
                          {"bt709", Matrix::bt709},
                          {"bt2020", Matrix::bt2020},
                          {"fcc", Matrix::fcc},
                          {"smpte240m", Matrix::smpte240m},
                          {"rgb", Matrix::rgb}});
}

polydpo::Size height_and_width(const py::handle& given) {
    const auto [height, width] = given.cast<std::pair<int, int>>();
    return {height, width};
}

// limits.DecodeLimits.
polydpo::Limits limits_of(const py::handle& given) {
    const auto count = [&](const char* name) { return given.attr(name).cast<std::int64_t>(); };
    return {count("pixels"), count("bytes"), count("decoded"), given.attr("scans").cast<int>(), count("chunk")};
}

// draws.Draw.
polydpo::Draw draw_of(const py::handle& given) {
    return {given.attr("centre").cast<bool>(), given.attr("top").cast<std::uint32_t>(),
            given.attr("left").cast<std::uint32_t>(), given.attr("flipped").cast<bool>()};
}

std::vector<polydpo::Draw> draws_of(const py::sequence& given) {
    std::vector<polydpo::Draw> draws;
    for (const py::handle draw : given) draws.push_back(draw_of(draw));
    return draws;
}

// decoding/arguments.py's Output. What it says nothing of is that of one image, decoded strictly and without limits.
polydpo::Options options_of(const py::handle& given) {
    polydpo::Options options{};
    options.output = height_and_width(given.attr("size"));
    options.resize = resize_of(given.attr("resize"));
    options.interpolation = interpolation_of(given.attr("interpolation"));
    options.dtype = dtype_of(given.attr("dtype"));
    options.planes = given.attr("planes").cast<bool>();
    const auto offset = given.attr("offset").cast<std::array<float, 3>>();
    const auto scale = given.attr("scale").cast<std::array<float, 3>>();
    std::copy(offset.begin(), offset.end(), options.normal.offset);
    std::copy(scale.begin(), scale.end(), options.normal.scale);
    const auto [red, green, blue] = given.attr("background").cast<std::array<std::uint8_t, 3>>();
    options.background = {red, green, blue};
    options.strict = true;
    options.threads = 1;
    return options;
}

// An image that is pixels already: pillow.RawImage.
void set_raw(std::vector<polydpo::Image>& images, const py::handle& given) {
    polydpo::Image& image = images.at(given.attr("row").cast<std::size_t>());
    image.raw = height_and_width(given.attr("size"));
    image.orientation = given.attr("orientation").cast<int>();
    if (image.bytes != 4 * static_cast<std::size_t>(image.raw.height) * static_cast<std::size_t>(image.raw.width)) {
        throw py::value_error("raw pixels are short");
    }
}

// The caller vouches for `out`: 2B * 3 * height * width elements of the dtype, or of planes 2B * height * 3/2 * width
// bytes. Returns the geometry of each sample, (2B, 4) int64 (oriented height and width, crop top and left), the
// failures as (sample, reason), and the damage that was let pass, likewise.
py::tuple decode_pairs(const py::sequence& win, const py::sequence& lose, const py::sequence& raw,
                       const py::sequence& draws, std::uintptr_t out, const py::object& output, bool apply_orientation,
                       bool strict, const py::object& limits, int threads, const py::str& jpeg) {
    Buffers buffers;
    buffers.add(win, "win");
    buffers.add(lose, "lose");
    std::vector<polydpo::Image> images = buffers.images();
    const std::vector<polydpo::Draw> drawn = draws_of(draws);
    if (images.size() != 2 * drawn.size()) throw py::value_error("win and lose do not hold B images each");
    for (const py::handle image : raw) set_raw(images, image);
    polydpo::Options options = options_of(output);
    options.apply_orientation = apply_orientation;
    options.strict = strict;
    options.limits = limits_of(limits);
    options.threads = threads;
    options.jpeg = jpeg_decoder_of(jpeg);
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

// What a foreign decoder is told of an image: the arguments of data/dali/picture.py's Placement.
py::dict plan_of(const polydpo::Size& source, const polydpo::Geometry& way) {
    using namespace py::literals;
    return py::dict("height"_a = source.height, "width"_a = source.width, "resized_height"_a = way.stored.height,
                    "resized_width"_a = way.stored.width, "crop_top"_a = way.crop.top, "crop_left"_a = way.crop.left,
                    "crop_height"_a = way.crop.height, "crop_width"_a = way.crop.width, "to_top"_a = way.inner.top,
                    "to_left"_a = way.inner.left, "transposed"_a = way.transposed, "rows_reversed"_a = way.row_reversed,
                    "cols_reversed"_a = way.col_reversed, "top"_a = way.top, "left"_a = way.left,
                    "down_first"_a = way.down_first);
}

// Image i with draws[i % draws.size()]. None where our own decoder is to be asked.
py::list foreign_plans(const py::sequence& images, const py::sequence& draws, const py::object& output,
                       bool apply_orientation, const py::object& limits) {
    Buffers buffers;
    buffers.add(images, "images");
    const std::vector<polydpo::Image> views = buffers.images();
    const std::vector<polydpo::Draw> drawn = draws_of(draws);
    if (drawn.empty()) throw py::value_error("draws is empty");
    const polydpo::Options options = options_of(output);
    const polydpo::Limits most = limits_of(limits);
    std::vector<std::optional<polydpo::ForeignPlan>> found(views.size());
    {
        const ReleasedGil released;
        for (std::size_t i = 0; i < views.size(); ++i) {
            found[i] = polydpo::foreign_plan(views[i], drawn[i % drawn.size()], options.output, options.resize,
                                             options.interpolation, apply_orientation, most);
        }
    }
    py::list plans;
    for (const auto& plan : found) {
        plans.append(plan ? py::object(plan_of(plan->source, plan->geometry)) : py::object(py::none()));
    }
    return plans;
}

// Of an upright frame. Throws RuntimeError where it does not fit.
py::dict plan(const py::object& source, const py::object& draw, const py::object& output) {
    const polydpo::Size stored = height_and_width(source);
    const polydpo::Options options = options_of(output);
    return plan_of(stored, polydpo::plan(stored, 1, options.output, options.resize, draw_of(draw)));
}

// The filter of one axis, for the outputs [offset, offset + length): the first input of each, (length,), and the
// weights from there on, (length, taps), those beyond its own 0.
py::tuple resize_filter(const py::str& interpolation, int source, int resized, int offset, int length) {
    if (source < 1 || resized < 1 || offset < 0 || length < 1 || length > resized - offset) {
        throw py::value_error("the outputs are none of the axis");
    }
    const auto filter = polydpo::make_filter(interpolation_of(interpolation), source, resized, offset, length);
    py::array_t<int> first(length, filter.first.data());
    return py::make_tuple(first, py::array_t<float>({length, filter.taps}, filter.weights.data()));
}

// Stores the frames of one clip, one by one, all under the same geometry. The caller vouches for `out`: 3 planes of
// height * width elements of the dtype, `plane` elements apart; or, of planes as they are stored, height * 3/2 * width
// bytes, and `plane` is not looked at.
class FrameStore {
public:
    // memory: bytes that a resize may take.
    FrameStore(const py::object& draw, const py::object& output, std::int64_t memory)
        : draw_(draw_of(draw)),
          options_(options_of(output)),
          finish_(options_.dtype, options_.normal,
                  3 * std::int64_t{options_.output.height} * options_.output.width >= large_frame) {
        options_.apply_orientation = true;
        options_.limits.decoded = memory;
        if (options_.planes && (options_.output.height % 2 || options_.output.width % 2)) {
            throw py::value_error("size is odd; expected even sides for planes");
        }
    }

    // planes: Y, Cb, Cr (or G, B, R) as buffers; strides: in bytes; depth: bits of a sample; shifts: of the chroma's
    // width and height; siting: of the chroma; shown: height and width with square pixels, before the frame is turned,
    // or None for the frame's own. Returns oriented height and width as shown, crop top and left. Throws RuntimeError.
    std::array<int, 4> store(const py::sequence& planes, const std::array<std::ptrdiff_t, 3>& strides,
                             const std::pair<int, int>& size, int depth, const std::pair<int, int>& shifts,
                             bool full_range, const py::str& matrix, int siting, int orientation,
                             const std::optional<std::pair<int, int>>& shown, std::uintptr_t out,
                             std::size_t plane) const {
        Buffers buffers;
        buffers.add(planes, "planes");
        const std::vector<polydpo::Image> views = buffers.images();
        if (views.size() != 3) throw py::value_error("planes are not three");
        const auto& [height, width] = size;
        const auto& [shift_x, shift_y] = shifts;
        polydpo::Frame frame{};
        frame.size = frame.shown = {height, width};
        if (shown) frame.shown = {shown->first, shown->second};
        frame.depth = depth;
        frame.shift_x = shift_x;
        frame.shift_y = shift_y;
        frame.full_range = full_range;
        frame.matrix = matrix_of(matrix);
        frame.siting = static_cast<polydpo::Siting>(siting);  // the numbers of H.264
        frame.orientation = orientation;
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

// -------------------------------------------------------------------------------------------------- losses

// A tensor: its winners, its losers, its dtype, and from one pair to the next in elements.
using Address = std::tuple<std::uintptr_t, std::uintptr_t, int, std::int64_t>;
using Mask = std::pair<std::uintptr_t, std::int64_t>;             // and from one pair to the next
using Sizes = std::tuple<std::int64_t, std::int64_t, bool, int>;  // pairs, elements of a sample, float64, threads
using Parameters = std::array<double, 9>;                         // arguments.Head says which

polydpo::Arms arms_of(const Address& address) {
    const auto& [win, lose, dtype, stride] = address;
    return {reinterpret_cast<const void*>(win), reinterpret_cast<const void*>(lose), static_cast<polydpo::Float>(dtype),
            stride};
}

polydpo::Batch batch_of(const Address& pred, const Address& ref, const Address& target, const Mask& mask,
                        const Sizes& sizes) {
    const auto& [pairs, numel, in_double, threads] = sizes;
    return {pairs,        numel,           arms_of(pred),
            arms_of(ref), arms_of(target), reinterpret_cast<const std::uint8_t*>(mask.first),
            mask.second,  in_double,       threads};
}

polydpo::Head make_head(const std::vector<std::tuple<int, int, int, double>>& program, int loss, int slope) {
    std::vector<polydpo::Instruction> instructions;
    for (const auto& [operation, left, right, constant] : program) {
        instructions.push_back({static_cast<polydpo::Operation>(operation), left, right, constant});
    }
    return polydpo::Head(std::move(instructions), loss, slope);
}

polydpo::Objective objective_of(const polydpo::Head* head, const Parameters& parameters, int reduction) {
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
// float32. metrics_at may be 0.
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
            for (std::int64_t i = 0; i < batch.pairs; ++i) {
                loss[i] = static_cast<Value>(table[polydpo::pair_columns * i]);
            }
        } else {
            *loss = static_cast<Value>(total);
        }
        for (int k = 0; metric && k < polydpo::metric_count; ++k) metric[k] = static_cast<Value>(metrics[k]);
    };
    if (batch.accumulate_in_double) {
        store(reinterpret_cast<double*>(loss_at), reinterpret_cast<double*>(metrics_at));
    } else {
        store(reinterpret_cast<float*>(loss_at), reinterpret_cast<float*>(metrics_at));
    }
}

// The caller vouches for all addresses. ref_error (2, B), beta, alpha and weight (B,) are of float64, or 0.
void pair_loss(const Address& pred, const Address& ref, const Address& target, const Mask& mask, const Sizes& sizes,
               const polydpo::Head* head, std::uintptr_t ref_error, std::uintptr_t beta, std::uintptr_t alpha,
               std::uintptr_t weight, const Parameters& parameters, int reduction, std::uintptr_t loss,
               std::uintptr_t metrics, std::uintptr_t table) {
    const polydpo::Batch batch = batch_of(pred, ref, target, mask, sizes);
    polydpo::Objective objective = objective_of(head, parameters, reduction);
    objective.ref_error_win = reinterpret_cast<const double*>(ref_error);
    objective.ref_error_lose = ref_error ? objective.ref_error_win + batch.pairs : nullptr;
    objective.beta = reinterpret_cast<const double*>(beta);
    objective.alpha = reinterpret_cast<const double*>(alpha);
    objective.weight = reinterpret_cast<const double*>(weight);
    run_loss(batch, objective, loss, metrics, table);
}

void pair_gradient(const Address& pred, const Address& target, const Mask& mask, const Sizes& sizes,
                   std::uintptr_t coefficients, std::int64_t coefficients_stride, std::uintptr_t grad_loss,
                   bool grad_loss_is_double, std::int64_t grad_loss_stride, const Address& grad) {
    const polydpo::Batch batch = batch_of(pred, {}, target, mask, sizes);
    const auto& [win, lose, dtype, stride] = grad;
    const ReleasedGil released;
    polydpo::pair_gradient(batch, reinterpret_cast<const double*>(coefficients), coefficients_stride,
                           reinterpret_cast<const void*>(grad_loss), grad_loss_is_double, grad_loss_stride,
                           reinterpret_cast<void*>(win), reinterpret_cast<void*>(lose), stride);
}

// Both for tensors of which all but the addresses is known.
class BoundLoss {
public:
    // From the winners to the losers in bytes, dtype, stride in elements.
    using Form = std::tuple<std::ptrdiff_t, int, std::int64_t>;

    // forms: of pred, ref, target and gradient. sizes: pairs, elements of a sample, whether to compute in float64.
    BoundLoss(const std::array<Form, 4>& forms, const std::tuple<std::int64_t, std::int64_t, bool>& sizes,
              const polydpo::Head& head, const Parameters& parameters, int reduction)
        : forms_(forms), sizes_(sizes), head_(head), objective_(objective_of(&head_, parameters, reduction)) {}
    BoundLoss(const BoundLoss&) = delete;  // objective_ points into it

    void errors(std::uintptr_t pred, std::uintptr_t ref, std::uintptr_t target, std::uintptr_t loss,
                std::uintptr_t metrics, std::uintptr_t table, int threads) const {
        check_memory(pred && ref && target);
        run_loss(batch(pred, ref, target, threads), objective_, loss, metrics, table);
    }

    void gradient(std::uintptr_t pred, std::uintptr_t target, std::uintptr_t table, std::uintptr_t grad_loss,
                  std::int64_t grad_loss_stride, std::uintptr_t grad, int threads) const {
        check_memory(pred && target && table && grad_loss);
        const polydpo::Batch tensors = batch(pred, 0, target, threads);
        const auto* coefficients = reinterpret_cast<const double*>(table) + polydpo::grad_win;
        const polydpo::Arms to = arms(grad, forms_[3]);
        const ReleasedGil released;
        polydpo::pair_gradient(tensors, coefficients, polydpo::pair_columns, reinterpret_cast<const void*>(grad_loss),
                               tensors.accumulate_in_double, grad_loss_stride, const_cast<void*>(to.win),
                               const_cast<void*>(to.lose), to.stride);
    }

private:
    // Storages are freed under tensors that are still there by FSDP, and by hand.
    static void check_memory(bool there) {
        if (!there) {
            throw py::value_error("a tensor has no memory; expected one whose storage is there");
        }
    }

    static polydpo::Arms arms(std::uintptr_t win, const Form& form) {
        const auto& [lose, dtype, stride] = form;
        return arms_of({win, win + lose, dtype, stride});
    }

    polydpo::Batch batch(std::uintptr_t pred, std::uintptr_t ref, std::uintptr_t target, int threads) const {
        const auto& [pairs, numel, in_double] = sizes_;
        const auto& [of_pred, of_ref, of_target, of_grad] = forms_;
        return {pairs,     numel,  arms(pred, of_pred), arms(ref, of_ref), arms(target, of_target), nullptr, 0,
                in_double, threads};
    }

    std::array<Form, 4> forms_;
    std::tuple<std::int64_t, std::int64_t, bool> sizes_;
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
               py::arg("draws"), py::arg("out"), py::arg("output"), py::arg("apply_orientation"), py::arg("strict"),
               py::arg("limits"), py::arg("threads"), py::arg("jpeg") = "either");
    module.def("foreign_plans", &foreign_plans, py::arg("images"), py::kw_only(), py::arg("draws"), py::arg("output"),
               py::arg("apply_orientation"), py::arg("limits"));
    module.def("resize_filter", &resize_filter, py::arg("interpolation"), py::arg("source"), py::arg("resized"),
               py::arg("offset"), py::arg("length"));
    module.def("plan", &plan, py::arg("source"), py::kw_only(), py::arg("draw"), py::arg("output"));
    py::class_<FrameStore>(module, "FrameStore")
        .def(py::init<const py::object&, const py::object&, std::int64_t>(), py::kw_only(), py::arg("draw"),
             py::arg("output"), py::arg("memory"))
        .def("store", &FrameStore::store, py::arg("planes"), py::arg("strides"), py::kw_only(), py::arg("size"),
             py::arg("depth"), py::arg("shifts"), py::arg("full_range"), py::arg("matrix"), py::arg("siting") = 0,
             py::arg("orientation") = 1, py::arg("shown") = py::none(), py::arg("out"), py::arg("plane"));
    py::class_<polydpo::Head>(module, "Head").def(py::init(&make_head));
    py::class_<BoundLoss>(module, "BoundLoss")
        .def(py::init<const std::array<BoundLoss::Form, 4>&, const std::tuple<std::int64_t, std::int64_t, bool>&,
                      const polydpo::Head&, const Parameters&, int>())
        .def("errors", &BoundLoss::errors)
        .def("gradient", &BoundLoss::gradient);
    module.def("set_openmp",
               [](std::uintptr_t entry) { polydpo::set_openmp(reinterpret_cast<polydpo::GompParallel>(entry)); });
    module.def("pair_loss", &pair_loss);
    module.def("pair_gradient", &pair_gradient);
    module.def("build_info", &build_info);
}
