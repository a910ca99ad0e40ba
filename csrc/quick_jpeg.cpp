#include "quick_jpeg.hpp"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "error.hpp"
#include "idct.hpp"
#include "ycc.hpp"

namespace polydpo {

#ifdef POLYDPO_V3
namespace {

// The samples of the last two rows of MCUs: the chroma between two rows of samples may lie in either.
class Samples {
public:
    // Of `count` columns, the first of which is at `left` (a multiple of eight).
    void begin(int rows, int left, int count, int columns) {
        rows_ = 2 * rows;
        left_ = left;
        columns_ = columns;
        stride_ = margin + (count + 2 * DCTSIZE + ycc_margin + margin - 1) / margin * margin;
        bytes_.resize(static_cast<std::size_t>(stride_) * rows_ + margin);
    }
    std::ptrdiff_t stride() const { return stride_; }
    // Of a row of the image: the sample of column x.
    std::uint8_t* at(int row, int x) {
        return bytes_.data() + static_cast<std::ptrdiff_t>(row % rows_) * stride_ + margin + (x - left_);
    }
    // Beside the image lie its outermost samples again.
    void extend(int row, int count, int right) {
        for (int y = row; y < row + count; ++y) {
            if (left_ == 0) *at(y, -1) = *at(y, 0);
            if (right >= columns_) *at(y, columns_) = *at(y, columns_ - 1);
        }
    }

private:
    static constexpr int margin = 64;
    int rows_ = 0, left_ = 0, columns_ = 0;
    std::ptrdiff_t stride_ = 0;
    std::vector<std::uint8_t> bytes_;
};

class QuickJpegReader : public LevelsReader {
public:
    QuickJpegReader(std::unique_ptr<JpegHeader> header, const Limits& limits)
        : header_(std::move(header)), entropy_(header_->info, limits.scans) {
        const jpeg_decompress_struct& info = header_->info;
        count_ = info.num_components;
        for (int i = 0; i < count_; ++i) {
            const int number = info.comp_info[i].quant_tbl_no;
            const JQUANT_TBL* table = number >= 0 && number < NUM_QUANT_TBLS ? info.quant_tbl_ptrs[number] : nullptr;
            if (table == nullptr) throw LibjpegNeeded();
            std::copy_n(table->quantval, DCTSIZE2, steps_[i]);
        }
        half_across_ = count_ == 3 && info.comp_info[0].h_samp_factor == 2;
        half_down_ = count_ == 3 && info.comp_info[0].v_samp_factor == 2;
    }

    Size size() const override { return header_->size(); }
    int orientation() const override { return header_->orientation(); }

    Region start(const Region& wanted) override {
        region_ = wanted;
        if (half_across_) region_.left &= ~1;
        region_.width = wanted.left + wanted.width - region_.left;
        begin(region_);
        for (auto& row : chroma_) row.resize(static_cast<std::size_t>(region_.width) + 2 * ycc_margin);
        for (auto& row : levels_) row.resize(static_cast<std::size_t>(region_.width) + ycc_margin);
        room_.resize(static_cast<std::size_t>(region_.width) / 2 + 2 * ycc_margin);
        return region_;
    }

    Levels read_levels() override {
        const int y = region_.top + row_++, left = region_.left, width = region_.width;
        read_until(y);
        const std::uint8_t* luma = samples_[0].at(y, left);
        if (count_ == 1) return {{luma, luma, luma}};
        if (header_->info.jpeg_color_space == JCS_RGB) {
            return {{luma, samples_[1].at(y, left), samples_[2].at(y, left)}};
        }
        const std::uint8_t* chroma[2];
        for (int i = 0; i < 2; ++i) {
            Samples& from = samples_[1 + i];
            std::uint8_t* to = chroma_[i].data();
            chroma[i] = half_across_ ? to : from.at(y, left);
            const int count = (width + 1) / 2;
            if (half_down_) {
                const int rows = (size().height + 1) / 2, near = y / 2;
                const int far = std::clamp(y % 2 ? near + 1 : near - 1, 0, rows - 1);
                double_between(from.at(near, left / 2), from.at(far, left / 2), count, room_.data(), to);
            } else if (half_across_) {
                double_across(from.at(y, left / 2), count, to);
            }
        }
        ycc_to_rgb(luma, chroma[0], chroma[1], width, levels_[0].data(), levels_[1].data(), levels_[2].data());
        return {{levels_[0].data(), levels_[1].data(), levels_[2].data()}};
    }

    void finish() override {
        if (region_.top + row_ == size().height || header_->strict()) read_rest();
    }

    void read_planes(const Region& crop, std::uint8_t* planes) override {
        if (!header_->is_yuv420()) throw DecodeError("it is not stored as YCbCr 4:2:0");
        begin(crop);
        std::uint8_t* to[3] = {planes, planes + static_cast<std::size_t>(crop.height) * crop.width, nullptr};
        to[2] = to[1] + static_cast<std::size_t>(crop.height / 2) * (crop.width / 2);
        for (int y = crop.top; y < crop.top + crop.height; ++y) {
            read_until(y);
            for (int part = 0; part < (y % 2 ? 1 : 3); ++part) {
                const int half = part > 0 ? 2 : 1;
                const auto width = static_cast<std::size_t>(crop.width / half);
                std::memcpy(to[part], samples_[part].at(y / half, crop.left / half), width);
                to[part] += width;
            }
        }
        read_rest();
    }

private:
    int width() const override { return region_.width; }

    // Of a component: as many samples are as many pixels, or twice as many.
    int half_across(int part) const { return half_across_ && part > 0 ? 2 : 1; }
    int half_down(int part) const { return half_down_ && part > 0 ? 2 : 1; }
    int mcu_height() const { return half_down_ ? 2 * DCTSIZE : DCTSIZE; }

    // What is to be made samples of: the region, and two pixels beyond it for the chroma between them.
    void begin(const Region& region) {
        first_row_ = std::max(0, region.top - 2) / mcu_height();
        const int mcu_width = half_across_ ? 2 * DCTSIZE : DCTSIZE;
        const int left = std::max(0, region.left - 2) / mcu_width;
        const int right = (std::min(size().width, region.left + region.width + 2) + mcu_width - 1) / mcu_width;
        for (int i = 0; i < count_; ++i) {
            const int half = half_across(i), blocks = mcu_width / DCTSIZE / half;
            first_block_[i] = left * blocks;
            blocks_[i] = (right - left) * blocks;
            samples_[i].begin(mcu_height() / half_down(i), DCTSIZE * first_block_[i], DCTSIZE * blocks_[i],
                              (size().width + half - 1) / half);
        }
    }

    // Until there are the samples of row y, and of the row of chroma beyond it.
    void read_until(int y) {
        const int last = std::min(entropy_.rows() - 1, (y + (half_down_ ? y % 2 : 0)) / mcu_height());
        for (; mcu_rows_ <= last; ++mcu_rows_) {
            entropy_.read_row();
            if (mcu_rows_ < first_row_) continue;
            for (int i = 0; i < count_; ++i) transform(i);
        }
    }

    void transform(int part) {
        const int rows = mcu_height() / half_down(part), first = mcu_rows_ * rows, left = first_block_[part];
        for (int y = 0; y < rows; y += DCTSIZE) {
            const EntropyDecoder::Row row = entropy_.row(part, y / DCTSIZE, left, blocks_[part]);
            inverse_dct(row.coefficients, row.last, blocks_[part], steps_[part],
                        samples_[part].at(first + y, DCTSIZE * left), samples_[part].stride());
        }
        if (part > 0) samples_[part].extend(first, rows, DCTSIZE * (left + blocks_[part]));
    }

    void read_rest() {
        for (; mcu_rows_ < entropy_.rows(); ++mcu_rows_) entropy_.read_row();
        entropy_.finish();
    }

    std::unique_ptr<JpegHeader> header_;
    EntropyDecoder entropy_;
    int count_;                     // of components: 1 or 3
    bool half_across_, half_down_;  // chroma
    std::uint16_t steps_[3][DCTSIZE2];

    Region region_{};
    int row_ = 0;                       // of it, the next one
    int mcu_rows_ = 0, first_row_ = 0;  // that were read; which is to be made samples of
    int first_block_[3], blocks_[3];    // of each component, across
    Samples samples_[3];
    std::vector<std::uint8_t> chroma_[2], levels_[3];
    std::vector<std::uint16_t> room_;
};

}  // namespace

bool is_quick_jpeg(const JpegHeader& header, const Limits& limits) {
    const jpeg_decompress_struct& info = header.info;
    if (!EntropyDecoder::knows(info) || EntropyDecoder::memory(info) > limits.decoded) return false;
    if (info.num_components == 1) return info.jpeg_color_space == JCS_GRAYSCALE;
    const bool half = info.comp_info[0].h_samp_factor > 1;
    // Of very narrow images libjpeg does not interpolate the chroma.
    return half ? info.jpeg_color_space == JCS_YCbCr && info.image_width > 4
                : info.jpeg_color_space == JCS_YCbCr || info.jpeg_color_space == JCS_RGB;
}

std::unique_ptr<LevelsReader> quick_jpeg_reader(std::unique_ptr<JpegHeader> header, const Limits& limits) {
    return std::make_unique<QuickJpegReader>(std::move(header), limits);
}

#else

bool is_quick_jpeg(const JpegHeader&, const Limits&) { return false; }
std::unique_ptr<LevelsReader> quick_jpeg_reader(std::unique_ptr<JpegHeader>, const Limits&) { throw LibjpegNeeded(); }

#endif

}  // namespace polydpo
