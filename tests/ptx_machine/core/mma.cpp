// ldmatrix, stmatrix and mma.sync, each by a whole warp.
#include "machine.h"

namespace ptx {
namespace {

enum Number { kOffsetNumber, kTransposed };

// Matrix i of 8 rows of 16 bytes: lane 8*i + r names row r; lane l holds, of row l/4, elements
// 2*(l%4) and the next in one register. Transposed, rows and columns change places in memory.
void store_matrix(Machine& m, Warp& w, const Instruction& i, Mask) {
  u32 addresses[kLanes];
  for (size_t matrix = 0; matrix + 1 < i.in.size(); ++matrix) {
    u16 values[8][8];
    const u32* pairs = w.lanes<u32>(i.in[1 + matrix]);
    for (int l = 0; l < kLanes; ++l) {
      for (int e = 0; e < 2; ++e) {
        const u16 value = static_cast<u16>(pairs[l] >> (16 * e));
        (i.number[kTransposed] ? values[2 * (l % 4) + e][l / 4] : values[l / 4][2 * (l % 4) + e]) =
            value;
      }
    }
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * static_cast<int>(matrix) + row;
      addresses[lane] =
          static_cast<u32>(w.value(i.in[0], lane) + static_cast<u64>(i.number[kOffsetNumber]));
      Cta& cta = m.owner(w, addresses[lane], false);
      u8* to = m.shared(w, cta, addresses[lane], 16);
      Access access{w.agent(kWrite), w.time, w.pc(), true};
      access.rewrites = std::memcmp(to, values[row], 16) == 0;
      m.touch_shared(cta, addresses[lane], 16, access, w.known);
      std::memcpy(to, values[row], 16);
    }
    m.count_banks(w, 0xFFu << (8 * matrix), addresses, 16);
  }
}

void load_matrix(Machine& m, Warp& w, const Instruction& i, Mask) {
  u32 addresses[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    addresses[l] =
        static_cast<u32>(w.value(i.in[0], l) + static_cast<u64>(i.number[kOffsetNumber]));
  }
  for (size_t matrix = 0; matrix < i.out.size(); ++matrix) {
    u16 values[8][8];
    for (int row = 0; row < 8; ++row) {
      const u32 address = addresses[8 * matrix + static_cast<size_t>(row)];
      Cta& cta = m.owner(w, address, false);
      std::memcpy(values[row], m.shared(w, cta, address, 16), 16);
      m.touch_shared(cta, address, 16, {w.agent(kRead), w.time, w.pc(), false}, w.known);
    }
    for (int l = 0; l < kLanes; ++l) {
      u32 pair = 0;
      for (int e = 0; e < 2; ++e) {
        pair |= u32{i.number[kTransposed] ? values[2 * (l % 4) + e][l / 4]
                                          : values[l / 4][2 * (l % 4) + e]}
                << (16 * e);
      }
      w.lanes<u32>(i.out[matrix])[l] = pair;
    }
    m.count_banks(w, 0xFFu << (8 * matrix), addresses, 16);
  }
}

template <bool kLoad>
void decode_matrix(Decoder& d) {
  for (const char* name : {"sync", "aligned", "m8n8"}) d.modifiers.take_one({name});
  const int count = 1 << d.modifiers.take_one({"x1", "x2", "x4"});
  const bool transposed = d.modifiers.take("trans");
  d.modifiers.take_one({"shared", "shared::cta"});
  d.modifiers.take_one({"b16"});
  const int address = kLoad ? 1 : 0, values = kLoad ? 0 : 1;
  if (d.parts(values) != count) throw Failure("the vector has another length");
  d.made.number = {d.address(address, 4), transposed};
  for (int part = 0; part < count; ++part) kLoad ? d.out(values, 4, part) : d.in(values, 4, part);
  d.made.gathers = true;
  d.made.flow = Flow::kSwitch;
  d.made.run = kLoad ? load_matrix : store_matrix;
}

// --- mma.sync
// ---------------------------------------------------------------------------------------

enum class Input { kBf16, kF16, kTf32 };

template <Input kInput>
float low(u32 pair) {
  if constexpr (kInput == Input::kTf32) return bits<float>(pair & ~0x1FFFu);
  if constexpr (kInput == Input::kBf16) return Bfloat{static_cast<u16>(pair)};
  return Half{static_cast<u16>(pair)};
}

// D[16, 8] = A[16, K] * B[K, 8] + C, in fp32. Lane l holds, of A, rows l/4 and l/4 + 8; of B,
// column l/4; of C and D, rows as of A and columns 2*(l%4) and the next. Along K a 16-bit register
// is a pair: elements 2*(l%4) and the next, and 8 further in the next register; tf32 has element
// l%4, and 4 further.
template <Input kInput, int kDepth>
void multiply(Machine& m, Warp& w, const Instruction& i, Mask) {
  m.progress();
  constexpr bool kPairs = kInput != Input::kTf32;
  constexpr int kStep = kPairs ? 8 : 4, kHalves = kDepth / kStep;  // registers along K
  float a[16][kDepth], b[kDepth][8], c[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const int row = l / 4, at = l % 4;
    for (int h = 0; h < kHalves; ++h) {
      for (int e = 0; e < (kPairs ? 2 : 1); ++e) {
        const int k = kStep * h + (kPairs ? 2 * at + e : at);
        for (int half = 0; half < 2; ++half) {
          a[row + 8 * half][k] =
              low<kInput>(w.lanes<u32>(i.in[static_cast<size_t>(2 * h + half)])[l] >> (16 * e));
        }
        b[k][row] =
            low<kInput>(w.lanes<u32>(i.in[static_cast<size_t>(2 * kHalves + h)])[l] >> (16 * e));
      }
    }
    for (int r = 0; r < 4; ++r) {
      c[row + 8 * (r / 2)][2 * at + r % 2] =
          w.lanes<float>(i.in[static_cast<size_t>(3 * kHalves + r)])[l];
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sum[8] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < 8; ++n) sum[n] += a[row][k] * b[k][n];
    }
    for (int n = 0; n < 8; ++n) c[row][n] += sum[n];
  }
  for (int l = 0; l < kLanes; ++l) {
    for (int r = 0; r < 4; ++r) {
      w.lanes<float>(i.out[static_cast<size_t>(r)])[l] =
          c[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2];
    }
  }
}

template <Input kInput, int kDepth>
void product(Table& table, const std::string& type) {
  const std::string name = "mma.sync.aligned.m16n8k" + std::to_string(kDepth) + ".row.col.f32." +
                           type + "." + type + ".f32";
  table.add(name, [](Decoder& d) {
    constexpr int kStep = kInput == Input::kTf32 ? 4 : 8;
    const int parts[] = {4, 2 * kDepth / kStep, kDepth / kStep, 4};
    for (int operand = 0; operand < 4; ++operand) {
      for (int part = 0; part < parts[operand]; ++part) {
        operand == 0 ? d.out(operand, 4, part) : d.in(operand, 4, part);
      }
    }
    d.made.gathers = true;
    d.made.run = multiply<kInput, kDepth>;
  });
}

}  // namespace

void add_mma(Table& table) {
  table.family("ldmatrix", decode_matrix<true>);
  table.family("stmatrix", decode_matrix<false>);
  product<Input::kBf16, 16>(table, "bf16");
  product<Input::kBf16, 8>(table, "bf16");
  product<Input::kF16, 16>(table, "f16");
  product<Input::kF16, 8>(table, "f16");
  product<Input::kTf32, 8>(table, "tf32");
  product<Input::kTf32, 4>(table, "tf32");
}

}  // namespace ptx
