#include "entropy.hpp"

#ifdef POLYDPO_V3

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "bits.hpp"
#include "coefficients.hpp"
#include "huffman.hpp"
#include "refinement.hpp"

namespace polydpo {

using namespace jpeg;

struct EntropyState {
    // A component, in blocks.
    struct Part {
        int across, down;  // of it
        int in_mcu_across, in_mcu_down;
        int stored_across;  // whole MCUs
        std::size_t first;  // number of its first block of those of the current row of MCUs, or of the image
        int name;
        int dc_table, ac_table;  // of the current scan
        int last_dc;
        std::int8_t bits_missing[DCTSIZE2];  // of each coefficient; -1: nothing of it is known
    };
    // A block of an MCU: its component, with tables; its number, and how far the next MCU's is.
    struct Place {
        Part* part;
        const Differences* differences;
        const Pairs* pairs;
        std::size_t number, step;
    };

    Window window;
    Bits unread{0, 0, nullptr};

    Part parts[3];
    int count;
    bool progressive;
    int mcus_across, mcu_rows, row;  // of the image
    int most_scans, scans;

    // The current scan.
    int in_scan[3];
    int scan_count, from, to, high, low;
    unsigned interval, interval_left, restart;
    unsigned ended;  // blocks that have nothing more in it

    Table tables[2][NUM_HUFF_TBLS];  // DC and AC
    Differences differences[NUM_HUFF_TBLS];
    Pairs pairs[NUM_HUFF_TBLS];
    Refinements refinements;

    // Of a row of MCUs; or of the image, as its first scans gave them, if it is progressive.
    std::unique_ptr<Block[]> blocks;
    std::size_t room = 0;          // for so many
    std::vector<Further> further;  // of each block of a progressive image
    // Of a row, be it of MCUs or of the blocks of a progressive image that are asked for; and the latter with all bits.
    std::vector<std::uint8_t> last;
    std::vector<Block> whole;
};

namespace {

static_assert(most_blocks_of_mcu == D_MAX_BLOCKS_IN_MCU && block_size == DCTSIZE2);

using Part = EntropyState::Part;

// ------------------------------------------------------------------------------------------------- scans

void go_on_after_restart(EntropyState& state, Bits& in) {
    if (!state.window.finished(in.next, in.count)) throw LibjpegNeeded();
    const std::uint8_t* marker = state.window.from();
    if (marker[1] != JPEG_RST0 + state.restart) throw LibjpegNeeded();
    in = {0, 0, state.window.begin(marker + 2, state.window.end())};
    state.restart = (state.restart + 1) % 8;
    state.interval_left = state.interval;
    state.ended = 0;
    for (Part& part : state.parts) part.last_dc = 0;
}

// Before `mcus`, all of which are no more than the largest MCU. Returns how many of them come before a restart.
POLYDPO_INLINE int prepare(EntropyState& state, Bits& in, int mcus) {
    if (__builtin_expect(state.interval > 0, 0)) {
        if (state.interval_left == 0) go_on_after_restart(state, in);
        mcus = static_cast<int>(std::min(static_cast<unsigned>(mcus), state.interval_left));
        state.interval_left -= static_cast<unsigned>(mcus);
    }
    state.window.ensure_mcu(in.next);
    return mcus;
}

// After them, if all was `right`.
POLYDPO_INLINE void check(const EntropyState& state, const Bits& in, bool right) {
    if (__builtin_expect(!right || state.window.overrun(in.next, in.count), 0)) throw LibjpegNeeded();
}

// A block's first coefficient, which was `last` in the block before. False: there is no such code. Afterwards there are
// 46 bits.
POLYDPO_INLINE bool read_first(Bits& in, const Differences& differences, int* last) {
    in.refill();
    if (const std::uint32_t entry = differences.entries[in.bits >> (64 - Differences::bits)];
        __builtin_expect(entry != 0, 1)) {
        in.drop(entry & 255);
        *last += static_cast<int>(entry) >> 16;
    } else {
        const Symbol symbol = differences.codes.look(in.bits);
        if (symbol.length == 0) return false;
        in.drop(symbol.length);
        *last += extended(in.take(symbol.value), symbol.value);
        in.refill();
    }
    return *last == static_cast<JCOEF>(*last);
}

// A block's coefficients after the one at `at`, up to that at `last`; `at` becomes the position of the last one there
// is, or one later. Of progressive images, `further` gets which they are, and `ended` how many further blocks have
// none. There must be 44 bits.
template <bool progressive>
POLYDPO_INLINE bool read_rest(Bits& in, const Pairs& pairs, JCOEF* block, unsigned& at, const unsigned last, int shift,
                              Further* further, unsigned& ended) {
    // If it is not `none`. Without a branch, as nobody could foresee which is.
    const auto put_unless = [&](bool none, unsigned position, std::uint64_t value) POLYDPO_INLINE_LAMBDA {
        JCOEF nowhere;
        JCOEF* const places[2] = {block + place[position], &nowhere};
        *places[none] = static_cast<JCOEF>(value);
        if (progressive) further->add(bit_of(position) & (std::uint64_t{none} - 1), value);
    };
    const auto put = [&](unsigned position, std::uint64_t value) POLYDPO_INLINE_LAMBDA {
        block[place[position]] = static_cast<JCOEF>(value);
        if (progressive) further->add(bit_of(position), value);
    };
    for (;;) {
        std::uint64_t entry;
#pragma GCC unroll 4
        for (int look = 0; look < 44 / Pairs::bits; ++look) {
            entry = pairs.entries[in.bits >> (64 - Pairs::bits)];
            if (__builtin_expect(entry == 0, 0)) goto long_way;
            const unsigned second = at + (entry >> 24 & 255);
            if (second >= last) goto closing;
            put(at + (entry >> 16 & 255), entry >> 32);
            put(second, entry >> 48);
            at = second;
            in.drop(entry & 255);
        }
        in.refill();
        continue;

    closing: {
        const unsigned first = at + (entry >> 16 & 255), second = at + (entry >> 24 & 255);
        if (__builtin_expect(second >= Pairs::end_of_block && (first < last || first >= Pairs::end_of_block), 1)) {
            // The first or the second says that the block ends.
            const bool none = first >= Pairs::end_of_block;
            put_unless(none, first % DCTSIZE2, entry >> 32);
            at = none ? at : first;
            in.drop(entry & 255);
            return true;
        }
        if (first >= last) {
            in.drop(entry >> 8 & 255);
            if (first != last) return false;
            put(first, entry >> 32);
            at = first;
            return true;
        }
        put(first, entry >> 32);
        in.drop(entry & 255);
        at = second;
        if (second == last) put(second, entry >> 48);
        return second == last;
    }

    long_way:
        in.refill();
        const Symbol symbol = pairs.codes.look(in.bits);
        if (symbol.length == 0) return false;
        in.drop(symbol.length);
        const int size = symbol.value & 15, run = symbol.value >> 4;
        if (size == 0 && run < 15) {
            if (progressive) ended = (1u << run) - 1 + static_cast<unsigned>(in.take(run));
            return true;
        }
        at += static_cast<unsigned>(run) + 1;
        if (size > 0) {
            const int value = extended(in.take(size), size) * (1 << shift);
            if (at > last || !is_coefficient(value)) return false;
            put(at, static_cast<std::uint64_t>(value));
            if (at == last) return true;
        } else if (at >= last) {
            return false;
        }
        in.refill();
    }
}

// The blocks of a row's first MCU. Of a scan of one component, an MCU is a block.
int places_of(EntropyState& state, int row, EntropyState::Place* places) {
    int count = 0;
    for (int i = 0; i < state.scan_count; ++i) {
        Part& part = state.parts[state.in_scan[i]];
        const bool alone = state.scan_count == 1;
        const int across = alone ? 1 : part.in_mcu_across, down = alone ? 1 : part.in_mcu_down;
        for (int y = 0; y < down; ++y) {
            const std::size_t first = part.first + (static_cast<std::size_t>(row) * down + y) * part.stored_across;
            for (int x = 0; x < across; ++x) {
                places[count++] = {&part, &state.differences[part.dc_table], &state.pairs[part.ac_table], first + x,
                                   static_cast<std::size_t>(across)};
            }
        }
    }
    return count;
}

// Calls read(in, first, count) for the blocks of a row, in a scan of one component, some of them at a time.
template <class Read>
POLYDPO_V3_INLINE void for_each_stretch(EntropyState& state, int row, int across, Read read) {
    const Part& part = state.parts[state.in_scan[0]];
    std::size_t number = part.first + static_cast<std::size_t>(row) * part.stored_across;
    Bits in = state.unread;
    for (int rest = across; rest > 0;) {
        const int count = prepare(state, in, std::min(rest, most_blocks_of_mcu));
        check(state, in, read(in, number, count));
        number += static_cast<std::size_t>(count);
        rest -= count;
    }
    state.unread = in;
}

// Calls read(in, place) for each block of a row of MCUs.
template <class Read>
POLYDPO_V3_INLINE void for_each_block(EntropyState& state, int row, int mcus, Read read) {
    EntropyState::Place places[most_blocks_of_mcu];
    const int count = places_of(state, row, places);
    Bits in = state.unread;
    for (; mcus > 0; --mcus) {
        prepare(state, in, 1);
        bool right = true;
        for (int i = 0; right && i < count; ++i) {
            right = read(in, places[i]);
            places[i].number += places[i].step;
        }
        check(state, in, right);
    }
    state.unread = in;
}

// Clears the coefficients of a row of MCUs before any of them is read: the first scan of a component has its first
// ones.
void clear(EntropyState& state, int row) {
    for (int i = 0; i < state.scan_count; ++i) {
        const Part& part = state.parts[state.in_scan[i]];
        const bool alone = state.scan_count == 1, is_last = alone && row == part.down - 1;
        const int first = alone ? row : row * part.in_mcu_down;
        const int end = is_last ? state.mcu_rows * part.in_mcu_down : first + (alone ? 1 : part.in_mcu_down);
        Block* const from = state.blocks.get() + part.first + static_cast<std::size_t>(first) * part.stored_across;
        std::memset(from, 0, static_cast<std::size_t>(end - first) * part.stored_across * sizeof(Block));
    }
}

POLYDPO_V3 void read_sequential(EntropyState& state) {
    std::memset(state.blocks.get(), 0, state.room * sizeof(Block));
    Block* const blocks = state.blocks.get();
    std::uint8_t* const lasts = state.last.data();
    for_each_block(state, 0, state.mcus_across, [&](Bits& in, const EntropyState::Place& at) POLYDPO_V3_LAMBDA {
        JCOEF* const block = blocks[at.number].values;
        unsigned ended = 0, last = 0;
        if (!read_first(in, *at.differences, &at.part->last_dc)) return false;
        block[0] = static_cast<JCOEF>(at.part->last_dc);
        const bool right = read_rest<false>(in, *at.pairs, block, last, DCTSIZE2 - 1, 0, nullptr, ended);
        lasts[at.number] = static_cast<std::uint8_t>(last);
        return right;
    });
}

POLYDPO_V3 void first_of_dc(EntropyState& state, int row, int mcus) {
    clear(state, row);
    Block* const blocks = state.blocks.get();
    const int low = state.low;
    for_each_block(state, row, mcus, [&](Bits& in, const EntropyState::Place& at) POLYDPO_V3_LAMBDA {
        if (!read_first(in, *at.differences, &at.part->last_dc)) return false;
        const int value = at.part->last_dc * (1 << low);
        blocks[at.number].values[0] = static_cast<JCOEF>(value);
        return value == static_cast<JCOEF>(value);
    });
}

POLYDPO_V3 void more_of_dc(EntropyState& state, int row, int mcus) {
    Block* const blocks = state.blocks.get();
    Further* const further = state.further.data();
    const int low = state.low;
    for_each_block(state, row, mcus, [&](Bits& in, const EntropyState::Place& at) POLYDPO_V3_LAMBDA {
        if (in.count == 0) in.refill();
        const int bit = in.take(1);
        if (low < Further::bits) {
            further[at.number].grown[low] |= std::uint64_t(bit) << 63;  // whatever its sign
        } else {
            blocks[at.number].values[0] |= static_cast<JCOEF>(bit << low);
        }
        return true;
    });
}

POLYDPO_V3 void first_of_ac(EntropyState& state, int row, int across) {
    const Pairs& pairs = state.pairs[state.parts[state.in_scan[0]].ac_table];
    const unsigned before = static_cast<unsigned>(state.from) - 1, to = static_cast<unsigned>(state.to);
    Block* const blocks = state.blocks.get();
    Further* const all_further = state.further.data();
    const int low = state.low;
    for_each_stretch(state, row, across, [&](Bits& in, std::size_t number, int count) POLYDPO_V3_LAMBDA {
        for (const std::size_t end = number + static_cast<std::size_t>(count); number < end;) {
            if (state.ended > 0) {
                const std::size_t empty = std::min(end - number, std::size_t{state.ended});
                state.ended -= static_cast<unsigned>(empty);
                number += empty;
                continue;
            }
            Further further = all_further[number];
            unsigned at = before;
            in.refill();
            if (!read_rest<true>(in, pairs, blocks[number].values, at, to, low, &further, state.ended)) {
                return false;
            }
            all_further[number].known = further.known;
            all_further[number++].negative = further.negative;
        }
        return true;
    });
}

template <class By>
POLYDPO_V3_INLINE void refine_row(EntropyState& state, int row, int across) {
    const Refinements& refinements = state.refinements;
    Further* const all_further = state.further.data();
    Block* const blocks = state.blocks.get();
    const int from = state.from, to = state.to, low = state.low;
    for_each_stretch(state, row, across, [&](Bits& in, std::size_t number, int count) POLYDPO_V3_LAMBDA {
        for (; count > 0; --count, ++number) {
            Further& further = all_further[number];
            std::uint64_t grown;
            if (!refine<By>(in, refinements, from, to, further, grown, state.ended)) return false;
            if (__builtin_expect(low < Further::bits, 1)) {
                further.grown[low] |= grown;
            } else {
                grow(blocks[number], grown, further.negative, low);
            }
        }
        return true;
    });
}

POLYDPO_V3 void more_of_ac(EntropyState& state, int row, int across) { refine_row<ByLoop>(state, row, across); }
POLYDPO_V3 void more_of_ac_by_pdep(EntropyState& state, int row, int across) { refine_row<ByPdep>(state, row, across); }

// ------------------------------------------------------------------------------------------------- markers

// Big-endian, as everything in a JPEG.
int word(const std::uint8_t* at) { return at[0] << 8 | at[1]; }

void need(bool condition) {
    if (!condition) throw LibjpegNeeded();
}

// At the header of a scan.
void begin_scan(EntropyState& state, const std::uint8_t* from, const std::uint8_t* end) {
    need(++state.scans <= state.most_scans);
    const bool dc = state.from == 0, first = state.high == 0;
    if (state.progressive) {
        need(dc ? state.to == 0 : state.scan_count == 1 && state.from <= state.to && state.to < DCTSIZE2);
        need(state.low <= 13 && (first || state.low == state.high - 1));
    } else {
        need(dc && state.to == DCTSIZE2 - 1 && first && state.low == 0 && state.scan_count == state.count);
    }
    for (int i = 0; i < state.scan_count; ++i) {
        Part& part = state.parts[state.in_scan[i]];
        need(i == 0 || state.in_scan[i - 1] < state.in_scan[i]);  // in another order not all are errors to libjpeg
        need(dc || part.bits_missing[0] >= 0);
        for (int k = state.from; k <= state.to; ++k) {
            need(part.bits_missing[k] == (first ? -1 : state.high));
            part.bits_missing[k] = static_cast<std::int8_t>(state.low);
        }
        need(part.dc_table >= 0 && part.dc_table < NUM_HUFF_TBLS && part.ac_table >= 0 &&
             part.ac_table < NUM_HUFF_TBLS);
        if (dc && first) need(state.differences[part.dc_table].build(state.tables[0][part.dc_table]));
        if (!state.progressive || (!dc && first)) {
            need(state.pairs[part.ac_table].build(state.tables[1][part.ac_table], state.progressive, state.low));
        }
        if (!dc && !first) need(state.refinements.build(state.tables[1][part.ac_table]));
        part.last_dc = 0;
    }
    state.unread = {0, 0, state.window.begin(from, end)};
    state.interval_left = state.interval;
    state.restart = 0;
    state.ended = 0;
}

// After a scan: its remaining bytes are read, and what comes between it and the next. False: the image ends.
bool next_scan(EntropyState& state) {
    need(state.window.finished(state.unread.next, state.unread.count));
    const std::uint8_t *at = state.window.from(), *const end = state.window.end();
    for (;;) {
        need(end - at >= 2 && at[0] == 0xff);
        const int marker = at[1];
        at += 2;
        if (marker == 0xd9) return false;
        need(end - at >= 2 && word(at) >= 2 && word(at) <= end - at);
        const std::uint8_t *body = at + 2, *const after = at + word(at);
        at = after;
        if (marker == 0xc4) {  // tables
            while (body < after) {
                need(after - body > 16 && (body[0] & ~0x13) == 0);
                Table& table = state.tables[body[0] >> 4][body[0] & 3];
                table = Table();
                int symbols = 0;
                for (int length = 1; length <= 16; ++length) symbols += table.counts[length] = body[length];
                body += 17;
                need(symbols <= 256 && symbols <= after - body);
                std::copy_n(body, symbols, table.symbols);
                table.given = true;
                body += symbols;
            }
        } else if (marker == 0xdd) {  // restart interval
            need(after - body == 2);
            state.interval = static_cast<unsigned>(word(body));
        } else if (marker == 0xda) {  // a scan
            need(after - body >= 1 && body[0] >= 1 && body[0] <= state.count && after - body == 2 * body[0] + 4);
            state.scan_count = *body++;
            for (int i = 0; i < state.scan_count; ++i, body += 2) {
                int part = 0;
                while (part < state.count && state.parts[part].name != body[0]) ++part;
                need(part < state.count);
                state.in_scan[i] = part;
                state.parts[part].dc_table = body[1] >> 4;
                state.parts[part].ac_table = body[1] & 15;
            }
            state.from = body[0];
            state.to = body[1];
            state.high = body[2] >> 4;
            state.low = body[2] & 15;
            begin_scan(state, after, end);
            return true;
        } else {
            // Of applications, or a comment. libjpeg looks into those of JFIF and Adobe, and may warn.
            need(((marker & 0xf0) == 0xe0 && marker != 0xe0 && marker != 0xee) || marker == 0xfe);
        }
    }
}

// All scans of a progressive image, whose first begins here.
void read_progressive(EntropyState& state) {
    do {
        const bool dc = state.from == 0, first = state.high == 0;
        const auto read = dc                ? (first ? first_of_dc : more_of_dc)
                          : first           ? first_of_ac
                          : pdep_is_quick() ? more_of_ac_by_pdep
                                            : more_of_ac;
        const Part& part = state.parts[state.in_scan[0]];
        const int across = state.scan_count == 1 ? part.across : state.mcus_across;
        const int down = state.scan_count == 1 ? part.down : state.mcu_rows;
        for (int row = 0; row < down; ++row) read(state, row, across);
    } while (next_scan(state));
    for (int i = 0; i < state.count; ++i) {
        for (const int bits : state.parts[i].bits_missing) need(bits == 0);
    }
}

std::int64_t divided_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

// Of the image that is grey, an MCU is a block, whatever its sampling factors are.
int samples_across(const jpeg_decompress_struct& info, int part) {
    return info.num_components == 1 ? 1 : info.comp_info[part].h_samp_factor;
}
int samples_down(const jpeg_decompress_struct& info, int part) {
    return info.num_components == 1 ? 1 : info.comp_info[part].v_samp_factor;
}

// Of the thread's last image, with its tables.
thread_local std::unique_ptr<EntropyState> spare;

}  // namespace

bool EntropyDecoder::knows(const jpeg_decompress_struct& info) {
    const int count = info.num_components;
    if (!is_x86_64_v3() || info.arith_code || info.data_precision != 8 || info.err->num_warnings != 0) return false;
    if (count != 1 && count != 3) return false;
    const int h = samples_across(info, 0), v = samples_down(info, 0);
    if (h > 2 || v > h) return false;
    for (int i = 1; i < count; ++i) {
        if (samples_across(info, i) != 1 || samples_down(info, i) != 1) return false;
        for (int k = 0; k < i; ++k) {
            if (info.comp_info[i].component_id == info.comp_info[k].component_id) return false;
        }
    }
    // Lossless images, which libjpeg-turbo 3 decodes, have no such scans.
    return info.progressive_mode || (info.comps_in_scan == count && info.Se == DCTSIZE2 - 1);
}

std::int64_t EntropyDecoder::memory(const jpeg_decompress_struct& info) {
    if (!info.progressive_mode) return 0;
    const std::int64_t h = samples_across(info, 0), v = samples_down(info, 0);
    const std::int64_t mcus = divided_up(info.image_width, DCTSIZE * h) * divided_up(info.image_height, DCTSIZE * v);
    const auto of_block = static_cast<std::int64_t>(sizeof(Block) + sizeof(Further));
    return mcus * (h * v + info.num_components - 1) * of_block;
}

EntropyDecoder::EntropyDecoder(const jpeg_decompress_struct& info, int most_scans)
    : state_(spare != nullptr ? std::move(spare) : std::make_unique<EntropyState>()) {
    EntropyState& state = *state_;
    state.count = info.num_components;
    state.progressive = info.progressive_mode;
    const int most_h = samples_across(info, 0), most_v = samples_down(info, 0);
    state.mcus_across = static_cast<int>(divided_up(info.image_width, DCTSIZE * most_h));
    state.mcu_rows = static_cast<int>(divided_up(info.image_height, DCTSIZE * most_v));
    state.row = 0;
    state.scans = 0;
    state.most_scans = most_scans;
    std::size_t blocks = 0;
    for (int i = 0; i < state.count; ++i) {
        Part& part = state.parts[i];
        const int h = samples_across(info, i), v = samples_down(info, i);
        part.across = static_cast<int>(divided_up(std::int64_t{info.image_width} * h, DCTSIZE * most_h));
        part.down = static_cast<int>(divided_up(std::int64_t{info.image_height} * v, DCTSIZE * most_v));
        part.in_mcu_across = h;
        part.in_mcu_down = v;
        part.stored_across = state.mcus_across * h;
        part.first = blocks;
        part.name = info.comp_info[i].component_id;
        std::fill(std::begin(part.bits_missing), std::end(part.bits_missing), std::int8_t{-1});
        blocks += static_cast<std::size_t>(part.stored_across) * v * (state.progressive ? state.mcu_rows : 1);
    }
    // One block more, as a row of blocks may be read two at a time.
    const std::size_t room = blocks + 1;
    if (state.room != room) {
        state.blocks.reset(new Block[room]);  // not cleared yet
        state.room = room;
    }
    state.blocks[blocks] = Block{};
    state.further.assign(state.progressive ? blocks : 0, Further());
    const auto across = static_cast<std::size_t>(state.parts[0].stored_across);
    state.last.assign((state.progressive ? across : blocks) + 1, 0);
    if (state.progressive) state.whole.assign(across + 1, Block{});
    for (int i = 0; i < NUM_HUFF_TBLS; ++i) {
        for (int ac = 0; ac < 2; ++ac) {
            const JHUFF_TBL* given = ac ? info.ac_huff_tbl_ptrs[i] : info.dc_huff_tbl_ptrs[i];
            Table& table = state.tables[ac][i] = Table();
            table.given = given != nullptr;
            if (given == nullptr) continue;
            std::copy_n(given->bits, sizeof table.counts, table.counts);
            std::copy_n(given->huffval, sizeof table.symbols, table.symbols);
            table.counts[0] = 0;
        }
    }
    state.scan_count = info.comps_in_scan;
    for (int i = 0; i < state.scan_count; ++i) {
        const jpeg_component_info& part = *info.cur_comp_info[i];
        state.in_scan[i] = part.component_index;
        state.parts[part.component_index].dc_table = part.dc_tbl_no;
        state.parts[part.component_index].ac_table = part.ac_tbl_no;
    }
    state.from = info.Ss;
    state.to = info.Se;
    state.high = info.Ah;
    state.low = info.Al;
    state.interval = info.restart_interval;
    begin_scan(state, info.src->next_input_byte, info.src->next_input_byte + info.src->bytes_in_buffer);
}

EntropyDecoder::~EntropyDecoder() {
    if (state_->progressive) {
        state_->blocks.reset();
        state_->room = 0;
        std::vector<Further>().swap(state_->further);
    }
    spare = std::move(state_);
}

int EntropyDecoder::rows() const { return state_->mcu_rows; }

void EntropyDecoder::read_row() {
    if (!state_->progressive) {
        read_sequential(*state_);
    } else if (state_->row == 0) {
        read_progressive(*state_);
    }
    ++state_->row;
}

void EntropyDecoder::finish() {
    if (!state_->progressive) need(!next_scan(*state_));
}

EntropyDecoder::Row EntropyDecoder::row(int component, int y, int left, int count) {
    EntropyState& state = *state_;
    const Part& part = state.parts[component];
    const int above = state.progressive ? (state.row - 1) * part.in_mcu_down : 0;
    const std::size_t number = part.first + static_cast<std::size_t>(above + y) * part.stored_across + left;
    const Block* const blocks = state.blocks.get() + number;
    if (!state.progressive) return {blocks->values, state.last.data() + number};
    make_whole(blocks, state.further.data() + number, count, state.whole.data(), state.last.data());
    return {state.whole[0].values, state.last.data()};
}

}  // namespace polydpo

#endif
