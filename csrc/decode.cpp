#include "decode.hpp"

#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <utility>

#include "canvas.hpp"
#include "error.hpp"
#include "jpeg.hpp"
#include "png.hpp"
#include "pool.hpp"
#include "quick_jpeg.hpp"
#include "raw.hpp"

namespace polydpo {
namespace {

void check(const char* name, std::int64_t value, std::int64_t limit, const char* unit) {
    if (value > limit) {
        throw DecodeError("it has " + std::to_string(value) + " " + unit + ", more than " + std::to_string(limit) +
                          " (limits." + name + ")");
    }
}

std::string not_an_image(const Image& image) {
    if (image.bytes == 0) return "it is empty";
    std::string text = "it is no image of a known format: it begins with";
    for (std::size_t i = 0; i < image.bytes && i < 4; ++i) {
        char byte[4];
        std::snprintf(byte, sizeof byte, " %02x", image.data[i]);
        text += byte;
    }
    return text;
}

constexpr std::size_t large_batch = 1 << 23;         // bytes; a smaller one may stay in the caches
constexpr std::int64_t small_progressive = 80 * 80;  // pixels; libjpeg decodes a smaller one before our tables are made

std::unique_ptr<Reader> open(const Image& image, const Options& options, JpegDecoder jpeg) {
    const Limits& limits = options.limits;
    if (image.raw.height > 0) {
        check("pixels", static_cast<std::int64_t>(image.raw.height) * image.raw.width, limits.pixels, "pixels");
        return std::make_unique<RawReader>(image.data, image.raw, image.orientation);
    }
    check("bytes", static_cast<std::int64_t>(image.bytes), limits.bytes, "bytes");
    if (is_jpeg(image.data, image.bytes)) {
        auto header = std::make_unique<JpegHeader>(image.data, image.bytes, limits, options.strict);
        const Size size = header->size();
        const bool slow = header->info.progressive_mode && std::int64_t{size.height} * size.width < small_progressive;
        if (jpeg != JpegDecoder::libjpeg && !(jpeg == JpegDecoder::either && slow) && is_quick_jpeg(*header, limits)) {
            return quick_jpeg_reader(std::move(header), limits);
        }
        if (jpeg == JpegDecoder::own) throw LibjpegNeeded();
        return std::make_unique<JpegReader>(std::move(header));
    }
    if (is_png(image.data, image.bytes)) {
        return std::make_unique<PngReader>(image.data, image.bytes, limits, options.strict, options.background);
    }
    throw DecodeError(not_an_image(image));
}

// Y, Cb, Cr as they are stored: nothing is turned, scaled or mirrored, and corners are even.
void render_planes(Reader& reader, int orientation, const Draw& draw, const Options& options, void* sample,
                   Decoded& result) {
    auto* stored = dynamic_cast<PlanesReader*>(&reader);
    if (stored == nullptr) throw DecodeError("it is not a JPEG, whose planes could be had as they are stored");
    if (orientation != 1) {
        throw DecodeError("it is stored turned or mirrored (EXIF orientation " + std::to_string(orientation) + ")");
    }
    const Size source = reader.size();
    Geometry geometry = plan(reader.shown(), 1, options.output, options.resize, draw, 2);
    if (geometry.stored.height != source.height || geometry.stored.width != source.width ||
        geometry.inner.height != options.output.height || geometry.inner.width != options.output.width) {
        throw DecodeError("it is " + std::to_string(source.height) + " x " + std::to_string(source.width) +
                          " and would have to be resized or padded");
    }
    geometry.crop.left &= ~1;  // even in the mirrored image is odd in the stored one, where the difference is odd
    result.top = geometry.crop.top;
    result.left = draw.flipped ? source.width - options.output.width - geometry.crop.left : geometry.crop.left;
    stored->read_planes(geometry.crop, static_cast<std::uint8_t*>(sample));
    result.damage = reader.damage();
}

}  // namespace

// Rows go from the entropy decoder to the output one by one, while they are in the first-level cache.
void render(Reader& reader, const Draw& draw, const Options& options, const Finish& finish, void* sample,
            std::size_t plane, Decoded& result) {
    const Size source = reader.size(), shown = reader.shown();
    const int orientation = options.apply_orientation ? reader.orientation() : 1;
    result.original = orientation >= 5 ? Size{shown.width, shown.height} : shown;
    if (options.planes) return render_planes(reader, orientation, draw, options, sample, result);
    const Geometry geometry = plan(shown, orientation, options.output, options.resize, draw);
    result.top = geometry.top;
    result.left = geometry.left;

    Canvas canvas(sample, plane, options.output, finish, geometry);
    canvas.pad(options.background);
    if (geometry.stored.height == source.height && geometry.stored.width == source.width) {
        const Region given = reader.start(geometry.crop);
        const int left = geometry.crop.left - given.left;
        if (auto* with_levels = dynamic_cast<LevelsReader*>(&reader)) {
            for (int y = 0; y < given.height; ++y) canvas.put(y, with_levels->read_levels() + left);
        } else {
            Row row(given.width);
            const std::uint8_t* from = row.data() + 4 * static_cast<std::size_t>(left);
            for (int y = 0; y < given.height; ++y) {
                reader.read_row(row.data());
                canvas.put(y, from);
            }
        }
    } else {
        const Interpolation kind = options.interpolation;
        check("decoded", Resampler::memory(source, geometry, kind), options.limits.decoded,
              "bytes of rows and weights to blend");
        Resampler resampler(source, geometry, kind);
        const Region given = reader.start(resampler.wanted());
        resampler.begin(given);
        int to = 0;
        for (int y = 0; y < given.height; ++y) {
            reader.read_row(resampler.next_row());
            resampler.commit();
            while (resampler.ready()) canvas.put(to++, resampler.take());
        }
    }
    reader.finish();
    result.damage = reader.damage();
}

std::vector<Decoded> decode_batch(const std::vector<Image>& images, const std::vector<Draw>& draws,
                                  const Options& options, void* out, const std::function<bool()>& stop) {
    std::vector<Decoded> results(images.size());
    const std::size_t plane = static_cast<std::size_t>(options.output.height) * options.output.width;
    const std::size_t bytes = options.planes ? plane * 3 / 2 : plane * 3 * size_of(options.dtype);
    const Finish finish(options.dtype, options.normal, images.size() * bytes >= large_batch);
    const auto fail = [&](std::size_t i, const char* text) {
        try {
            results[i].error = text;
        } catch (const std::bad_alloc&) {
            results[i].error = "out of memory";  // short enough to need none
        }
    };
    const auto decode = [&](std::size_t i) {
        char* sample = static_cast<char*>(out) + i * bytes;
        try {
            const auto whole = [&](JpegDecoder jpeg) {
                const auto reader = open(images[i], options, jpeg);
                render(*reader, draws[i % draws.size()], options, finish, sample, plane, results[i]);
            };
            try {
                whole(options.jpeg);
            } catch (const LibjpegNeeded&) {
                if (options.jpeg == JpegDecoder::own) throw DecodeError("only libjpeg can decode it");
                whole(JpegDecoder::libjpeg);
            }
        } catch (const std::bad_alloc&) {
            fail(i, "there is not enough memory to decode it");
        } catch (const std::exception& error) {
            fail(i, error.what());
        }
        finish.settle();
    };
    parallel_for(images.size(), options.threads, decode, stop);
    // Both arms or none.
    for (std::size_t i = 0; i < images.size(); ++i) {
        if (results[i].error.empty()) continue;
        std::memset(static_cast<char*>(out) + i * bytes, 0, bytes);
        std::memset(static_cast<char*>(out) + (i + draws.size()) % images.size() * bytes, 0, bytes);
    }
    return results;
}

}  // namespace polydpo
