#include "decode.hpp"

#include <cstring>
#include <exception>

#include "error.hpp"
#include "pool.hpp"
#include "resample.hpp"

namespace polydpo {
namespace {

std::string not_an_image(const Bytes& image) {
    if (image.size == 0) return "it is empty";
    std::string text = "it is not a JPEG: it begins with";
    for (std::size_t i = 0; i < image.size && i < 4; ++i) {
        char byte[4];
        std::snprintf(byte, sizeof byte, " %02x", image.data[i]);
        text += byte;
    }
    return text;
}

// Rows go from the entropy decoder to the output one by one, while they are in the first-level cache.
void decode_image(const Bytes& image, const Options& options, char* out, Decoded& result) {
    if (static_cast<std::int64_t>(image.size) > options.limits.bytes) {
        throw DecodeError("it has " + std::to_string(image.size) + " bytes, more than " +
                          std::to_string(options.limits.bytes) + " (limits.bytes)");
    }
    if (!is_jpeg(image.data, image.size)) throw DecodeError(not_an_image(image));

    JpegReader reader(image.data, image.size, options.limits, options.strict);
    const Size source = reader.size(), output = options.output;
    result.original = source;
    const Geometry geometry = plan_centre(source, output, options.resize);
    result.top = geometry.top;
    result.left = geometry.left;

    const std::size_t plane = static_cast<std::size_t>(output.height) * output.width;
    const auto row_of = [&](int y) {
        return out + static_cast<std::size_t>(y) * output.width * size_of(options.dtype);
    };
    reader.start();
    if (geometry.resized.height == source.height && geometry.resized.width == source.width) {
        std::vector<std::uint8_t> row(4 * static_cast<std::size_t>(source.width));
        for (int y = 0; y < source.height; ++y) {
            reader.read_row(row.data());
            const int to = y - geometry.top;
            if (to >= 0 && to < output.height) {
                store_row(row.data() + 4 * static_cast<std::size_t>(geometry.left), output.width, options.dtype,
                          row_of(to), plane);
            }
        }
    } else {
        Resampler resampler(source, geometry, output);
        int to = 0;
        for (int y = 0; y < source.height; ++y) {
            reader.read_row(resampler.next_row());
            resampler.commit();
            while (resampler.ready()) store_row(resampler.take(), output.width, options.dtype, row_of(to++), plane);
        }
    }
    reader.finish();
}

}  // namespace

std::vector<Decoded> decode_batch(const std::vector<Bytes>& images, const Options& options, void* out) {
    std::vector<Decoded> results(images.size());
    const std::size_t sample =
        3 * static_cast<std::size_t>(options.output.height) * options.output.width * size_of(options.dtype);
    parallel_for(images.size(), options.threads, [&](std::size_t i) {
        char* place = static_cast<char*>(out) + i * sample;
        try {
            decode_image(images[i], options, place, results[i]);
        } catch (const std::exception& error) {
            results[i].error = error.what();
            std::memset(place, 0, sample);
        }
    });
    return results;
}

}  // namespace polydpo
