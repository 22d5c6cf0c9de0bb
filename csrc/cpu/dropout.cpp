// Dropout on the CPU with the mask of lora_kernels/ops/lora_linear/philox.py, bit for bit: what
// takes PyTorch 60 passes over memory is one here. Called through ctypes; no header but C++'s own.
//
// All loops are plain and vectorise at -O3. Wider instructions than the baseline's (target_clones)
// gained nothing, and a block that fits the L2 cache is too little work to hand to threads.
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error numbers() takes the low half of a word to lie first
#endif

namespace {

constexpr int kRounds = 10;
constexpr int64_t kGroup = 8;    // elements of a row that share a counter
constexpr int64_t kGroups = 64;  // counters at a time: what they need stays in the L1 cache

struct Key {
  uint32_t low[kRounds], high[kRounds];

  explicit Key(uint64_t seed) {
    for (uint32_t i = 0; i < kRounds; ++i) {
      low[i] = static_cast<uint32_t>(seed) + i * 0x9E3779B9u;
      high[i] = static_cast<uint32_t>(seed >> 32) + i * 0xBB67AE85u;
    }
  }
};

// Writes the 16-bit numbers of the elements of `groups` groups of a row: [groups, kGroup].
void numbers(const Key& key, uint64_t row, int64_t first_group, int64_t groups, uint16_t* out) {
  uint32_t c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int64_t i = 0; i < groups; ++i) {
    c0[i] = static_cast<uint32_t>(first_group + i);
    c1[i] = static_cast<uint32_t>(row);
    c2[i] = static_cast<uint32_t>(row >> 32);
    c3[i] = 0;
  }
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t low = key.low[round], high = key.high[round];
    for (int64_t i = 0; i < groups; ++i) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * c0[i];
      const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2[i];
      c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ low;
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ high;
      c1[i] = static_cast<uint32_t>(product1);
      c3[i] = static_cast<uint32_t>(product0);
    }
  }
  for (int64_t i = 0; i < groups; ++i) {
    const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
    std::memcpy(out + kGroup * i, words, sizeof words);
  }
}

// Writes the elements whose mask is -1, and their product with zero where it is 0: zero of the same
// sign, or NaN for what is not finite.
template <class Word>
void keep(const int16_t* mask, int64_t exponent, const char* from, char* to, int64_t count) {
  const Word ones = static_cast<Word>(exponent);
  const Word sign = static_cast<Word>(Word{1} << (8 * sizeof(Word) - 1));
  const Word* source = reinterpret_cast<const Word*>(from);
  Word* kept = reinterpret_cast<Word*>(to);
  for (int64_t i = 0; i < count; ++i) {
    const Word dropped = static_cast<Word>(~static_cast<Word>(mask[i]));
    const Word nan = (source[i] & ones) == ones ? static_cast<Word>(~sign) : Word{0};
    kept[i] = (source[i] & (static_cast<Word>(~dropped) | sign)) | (dropped & nan);
  }
}

}  // namespace

// A tile of any dtype, rows `*_stride` bytes apart, and where it goes: elsewhere.
struct Tile {
  const char* from;
  int64_t from_stride;
  char* to;
  int64_t to_stride;
  int64_t itemsize;  // 2, 4 or 8
  int64_t exponent;  // the bits that are all set in what is not finite
};

extern "C" void lora_drop(uint64_t seed, uint16_t threshold, int64_t first_row, int64_t rows,
                          int64_t first_column, int64_t columns, const Tile* tiles, int64_t count) {
  const Key key(seed);
  const int64_t skip = first_column % kGroup;
  uint16_t number[kGroups * kGroup];
  int16_t mask[kGroups * kGroup];
  for (int64_t row = 0; row < rows; ++row) {
    // The first chunk starts within a group where the tile does.
    for (int64_t start = -skip; start < columns; start += kGroups * kGroup) {
      const int64_t groups = std::min((columns - start + kGroup - 1) / kGroup, kGroups);
      numbers(key, first_row + row, (first_column + start) / kGroup, groups, number);
      for (int64_t i = 0; i < groups * kGroup; ++i) mask[i] = number[i] >= threshold ? -1 : 0;
      const int64_t begin = std::max(start, int64_t{0});
      const int64_t end = std::min(start + kGroups * kGroup, columns);
      for (const Tile* tile = tiles; tile != tiles + count; ++tile) {
        const char* from = tile->from + row * tile->from_stride + begin * tile->itemsize;
        char* to = tile->to + row * tile->to_stride + begin * tile->itemsize;
        const auto function = tile->itemsize == 2   ? keep<uint16_t>
                              : tile->itemsize == 4 ? keep<uint32_t>
                                                    : keep<uint64_t>;
        function(mask + (begin - start), tile->exponent, from, to, end - begin);
      }
    }
  }
}
