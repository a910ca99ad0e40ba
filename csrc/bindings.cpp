// The only file that knows Python. Tensors come as addresses: the extension does not link against torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <png.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "decode.hpp"
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
py::tuple decode_pairs(const py::sequence& win, const py::sequence& lose, std::uintptr_t out, int dtype, int height,
                       int width, bool cover, bool strict, std::int64_t max_pixels, std::int64_t max_bytes,
                       int max_scans, int threads) {
    Buffers buffers;
    buffers.add(win, "win");
    buffers.add(lose, "lose");
    const std::vector<polydpo::Bytes> images = buffers.bytes();
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
    module.doc() = "Pair decoding in C++; use polydpo_fast.decode_pairs";
    module.def("decode_pairs", &decode_pairs, py::arg("win"), py::arg("lose"), py::kw_only(), py::arg("out"),
               py::arg("dtype"), py::arg("height"), py::arg("width"), py::arg("cover"), py::arg("strict"),
               py::arg("max_pixels"), py::arg("max_bytes"), py::arg("max_scans"), py::arg("threads"));
    module.def("build_info", &build_info);
}
