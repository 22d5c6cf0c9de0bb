// wgmma: D[64, N] += A[64, 16] * B[16, N] by the four warps of a warpgroup, each 16 rows of it.
//
// A descriptor says where an operand lies in the CTA's own shared memory (PTX ISA, "Matrix
// Descriptor"): bits 0-13 start / 16, 16-29 leading byte offset / 16, 32-45 stride byte offset /
// 16, 49-51 base offset, 62-63 swizzle: 0 none, 1, 2, 3 of 128, 64, 32 bytes.
#include "machine.h"

namespace ptx {
namespace {

enum Number { kN, kTransposedA, kTransposedB, kFromRegisters, kIsBf16, kNegated };

struct Descriptor {
  u32 start, leading, stride, base, swizzle_bytes;

  explicit Descriptor(u64 d)
      : start(static_cast<u32>(d & 0x3FFF) << 4),
        leading(static_cast<u32>(d >> 16 & 0x3FFF) << 4),
        stride(static_cast<u32>(d >> 32 & 0x3FFF) << 4),
        base(static_cast<u32>(d >> 49 & 7)),
        swizzle_bytes(d >> 62 == 0 ? 16 : 256u >> (d >> 62)) {}

  // Where the 8 elements of 16 bytes lie that hold element (row of M or N, k): consecutive along K,
  // or along M or N if `transposed`. Matrices of 8 x swizzle_bytes repeat: in the direction in
  // which elements are consecutive by the leading offset, in the other by the stride; without a
  // swizzle the two change places in the transposed layout.
  u32 chunk(u32 row, u32 k, bool transposed) const {
    const u32 along = transposed ? row : k, across = transposed ? k : row;
    const u32 wide = swizzle_bytes / 2;  // elements
    u32 at = start + along % wide * 2 + across % 8 * swizzle_bytes;
    if (swizzle_bytes == 16 && transposed) {
      at += along / wide * stride + across / 8 * leading;
    } else {
      at += along / wide * leading + across / 8 * stride;
    }
    return at ^ (at >> 3 & (swizzle_bytes - 16));
  }
};

// Reads an operand of `rows` of M or N from `first`, 16 deep.
void read(Machine& m, Warp& w, u64 descriptor, bool transposed, u32 first, u32 rows, bool is_bf16,
          u32 pc, float (*to)[16]) {
  const Descriptor d(descriptor);
  for (u32 row = 0; row < rows; row += transposed ? 8 : 1) {
    for (u32 k = 0; k < 16; k += transposed ? 1 : 8) {
      u16 values[8];
      std::memcpy(values, m.shared_raw(*w.cta, d.chunk(first + row, k, transposed), 16, pc), 16);
      for (u32 e = 0; e < 8; ++e) {
        const float value =
            is_bf16 ? static_cast<float>(Bfloat{values[e]}) : static_cast<float>(Half{values[e]});
        (transposed ? to[row + e][k] : to[row][k + e]) = value;
      }
    }
  }
}

void touch(Machine& m, Warp& w, u64 descriptor, bool transposed, u32 first, u32 rows) {
  const Descriptor d(descriptor);
  if (d.base != 0) m.report(w, "a wgmma descriptor with a base offset is not modelled");
  for (u32 row = 0; row < rows; row += transposed ? 8 : 1) {
    for (u32 k = 0; k < 16; k += transposed ? 1 : 8) {
      const u32 at = d.chunk(first + row, k, transposed);
      m.shared_raw(*w.cta, at, 16, w.pc());
      m.touch_shared(*w.cta, at, 16, {w.agent(kProduct), w.product_groups + 1, w.pc(), false, true},
                     w.known);
    }
  }
}

void remember(std::vector<u32>& held, u32 at) {
  held.insert(std::upper_bound(held.begin(), held.end(), at), at);
}

void forget(std::vector<u32>& held, u32 at) {
  held.erase(std::lower_bound(held.begin(), held.end(), at));
}

// Calls visit(list, register) for the registers that a product takes for itself.
template <class Visit>
void visit_registers(Warp& w, const Instruction& i, const Visit& visit) {
  for (const Slot slot : i.out) visit(w.accumulating, slot.at);
  if (!i.number[kFromRegisters]) return;
  for (size_t part = 0; part < 4; ++part) visit(w.read_by_products, i.in[part].at);
}

void fence(Machine&, Warp& w, const Instruction&, Mask) { w.product_fenced = true; }

void multiply(Machine& m, Warp& w, const Instruction& i, Mask) {
  if (!w.product_fenced) m.report(w, "wgmma without wgmma.fence");
  Product made{&i, 0, 0, true, w.product_groups};
  size_t operand = i.number[kFromRegisters] ? 4 : 0;
  if (!i.number[kFromRegisters]) {
    made.a = w.value(i.in[operand++], 0);
    touch(m, w, made.a, i.number[kTransposedA], w.index % 4 * 16, 16);
  }
  made.b = w.value(i.in[operand++], 0);
  touch(m, w, made.b, i.number[kTransposedB], 0, static_cast<u32>(i.number[kN]));
  made.accumulates = w.predicate(i.in[operand]) & 1;
  visit_registers(w, i, remember);
  w.products.push_back(std::move(made));
  if (m.random(2)) {
    for (Product& product : w.products) m.run_product(w, product);
  }
}

void commit(Machine& m, Warp& w, const Instruction&, Mask) {
  ++w.product_groups;
  m.progress();
}

void wait(Machine& m, Warp& w, const Instruction& i, Mask) {
  const s64 done = s64{w.product_groups} - i.number[0];
  while (!w.products.empty() && w.products.front().group < done) {
    m.run_product(w, w.products.front());
    visit_registers(w, *w.products.front().instruction, forget);
    w.products.pop_front();
  }
  if (done > 0) w.known.happened.raise(w.agent(kProduct), static_cast<u32>(done));
  w.product_fenced = false;
}

void decode(Decoder& d) {
  Modifiers& modifiers = d.modifiers;
  const int kind = modifiers.take_one({"fence", "commit_group", "wait_group", "mma_async"});
  modifiers.take_one({"sync"});
  modifiers.take_one({"aligned"});
  d.made.gathers = true;
  d.made.flow = Flow::kSwitch;
  static constexpr Handler kRuns[] = {fence, commit, wait, multiply};
  d.made.run = kRuns[kind];
  if (kind == 2) d.made.number = {d.immediate(0)};
  if (kind < 3) return;
  const std::string type = modifiers.take_type();
  modifiers.take_one({type});
  modifiers.take_one({"f32"});
  if (type != "bf16" && type != "f16") throw Failure("a type that is not modelled");
  int n = 0;
  for (int size = 8; size <= 256; size += 8) {
    if (modifiers.take("m64n" + std::to_string(size) + "k16")) n = size;
  }
  if (n == 0 || d.parts(0) != n / 2) throw Failure("a shape that is not modelled");
  for (int part = 0; part < n / 2; ++part) d.out(0, 4, part);
  const bool from_registers = d.parts(1) == 4;
  for (int part = 0; part < d.parts(1); ++part) d.in(1, from_registers ? 4 : 8, part);
  d.in(2, 8);
  d.in_predicate(3);
  if (d.immediate(4) != 1 || d.immediate(5) != 1)
    throw Failure("a negated operand is not modelled");
  const s64 transposed_a = from_registers ? 0 : d.immediate(6);
  d.made.number = {n, transposed_a, d.immediate(from_registers ? 6 : 7), from_registers,
                   type == "bf16"};
}

}  // namespace

// Lane l of warp i holds D[16*i + l/4 + 8*(r/2%2)][8*(r/4) + 2*(l%4) + r%2] in register r.
void Machine::run_product(Warp& w, Product& product) {
  if (product.done) return;
  product.done = true;
  const Instruction& i = *product.instruction;
  const u32 n = static_cast<u32>(i.number[kN]);
  const bool is_bf16 = i.number[kIsBf16];
  static thread_local float a[16][16], b[256][16], columns[16][256];
  if (!i.number[kFromRegisters]) {
    read(*this, w, product.a, i.number[kTransposedA], w.index % 4 * 16, 16, is_bf16, w.pc(), a);
  } else {
    for (int l = 0; l < kLanes; ++l) {
      for (int r = 0; r < 4; ++r) {
        for (int e = 0; e < 2; ++e) {
          const u16 raw =
              static_cast<u16>(w.lanes<u32>(i.in[static_cast<size_t>(r)])[l] >> (16 * e));
          a[l / 4 + 8 * (r % 2)][2 * (l % 4) + e + 8 * (r / 2)] =
              is_bf16 ? static_cast<float>(Bfloat{raw}) : static_cast<float>(Half{raw});
        }
      }
    }
  }
  read(*this, w, product.b, i.number[kTransposedB], 0, n, is_bf16, w.pc(), b);
  for (u32 k = 0; k < 16; ++k) {
    for (u32 column = 0; column < n; ++column) columns[k][column] = b[column][k];
  }
  for (int row = 0; row < 16; ++row) {
    float sum[256] = {};
    for (int k = 0; k < 16; ++k) {
      const float left = a[row][k];
      for (u32 column = 0; column < n; ++column) sum[column] += left * columns[k][column];
    }
    for (u32 column = 0; column < n; ++column) {
      const size_t r = column / 8 * 4 + static_cast<size_t>(row) / 8 * 2 + column % 2;
      float& d = w.lanes<float>(i.out[r])[row % 8 * 4 + static_cast<int>(column) % 8 / 2];
      d = (product.accumulates ? d : 0.0f) + sum[column];
    }
  }
}

void add_wgmma(Table& table) { table.family("wgmma", decode); }

}  // namespace ptx
