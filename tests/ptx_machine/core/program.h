// A program as the machine runs it, and how a statement becomes an instruction.
//
// `Table` holds every opcode. Arithmetic is listed by its full name ("add.s32"), one line each in
// alu.cpp, bits.cpp and predicates.cpp. An opcode with many modifiers is a family: a function that
// takes the modifiers it knows; one that is left over is an error.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "types.h"

namespace ptx {

class Machine;
struct Warp;
struct Instruction;

// Runs an instruction for `lanes` of the warp: those that are here and whose guard holds.
using Handler = void (*)(Machine&, Warp&, const Instruction&, Mask lanes);

// Where a register lies in a warp's file: 32 lanes of `bytes` each, or, of a predicate, one Mask.
struct Slot {
  u32 at = 0;
  u32 bytes = 0;
};

enum class Flow : u8 {
  kNext,    // goes on to the next instruction
  kSwitch,  // so too, but another warp may run in between
  kBranch,
  kExit,
};

struct Instruction {
  Handler run = nullptr;
  int line = 0;
  int opcode = 0;  // its place in Program::opcodes
  s64 guard = -1;  // the predicate's place in the file
  bool negated = false;
  bool gathers = false;  // every live lane of the warp must be here; of in.back() if `some`
  bool some = false;
  bool once = false;  // the warp issues it as one, however many of its lanes are here
  Flow flow = Flow::kNext;
  int registers = 0;  // that setmaxnreg asks for
  std::vector<Slot> out, in;
  std::array<s64, 8> number{};  // what the family needs: offsets, counts, flags
};

// A part of an operand: 'r' register, 'i' immediate, 's' shared address, 'x' special register,
// 'l' label, '_' nothing.
struct Scalar {
  char kind;
  s64 value;
  std::string name;
};

// A value, a vector {a, b}, a pair a|b, or an address [base+offset] or [map, {x, y}].
struct Operand {
  std::vector<Scalar> parts;
  s64 offset = 0;
  bool address = false;
};

struct Statement {
  int line;
  int guard;  // a register, or -1
  bool negated;
  std::string opcode;
  std::vector<Operand> operands;
};

struct Program {
  std::vector<Instruction> code;
  std::vector<std::string> opcodes;
  std::vector<u8> file;                // what a warp's registers hold at the start
  std::vector<Slot> shared_addresses;  // constants that the CTA's rank is added to
  std::vector<std::pair<std::string, u32>> specials;
};

// The modifiers of an opcode that nobody has asked for yet.
class Modifiers {
 public:
  explicit Modifiers(const std::string& opcode);

  // Whether `name` is there; takes it.
  bool take(const std::string& name);
  // The number of the first name that is there, which must be one of them.
  int take_one(const std::vector<std::string>& names);
  // The same, or `otherwise`.
  int take_any(const std::vector<std::string>& names, int otherwise);
  // The last one that names a type.
  std::string take_type();
  // The vector's length: 1, 2, 4 or 8.
  int take_vector();
  // Ignores what only speaks of caches.
  void take_cache_hints();
  void check_empty(const std::string& opcode) const;

  std::vector<std::string> left;
};

// One statement on its way to being an instruction.
class Decoder {
 public:
  Decoder(const Statement& statement, Instruction& made, class Layout& layout);

  Modifiers modifiers;
  Instruction& made;

  int operands() const { return static_cast<int>(statement_.operands.size()); }
  const Operand& operand(int i) const;
  int parts(int i) const { return static_cast<int>(operand(i).parts.size()); }

  // Registers of exactly `bytes` per lane; of at least that many; predicates.
  void out(int operand, int bytes, int part = 0) {
    made.out.push_back(slot(operand, part, bytes, false));
  }
  void in(int operand, int bytes, int part = 0) {
    made.in.push_back(slot(operand, part, bytes, false));
  }
  void out_wider(int operand, int bytes, int part = 0) {
    made.out.push_back(slot(operand, part, bytes, true));
  }
  void in_wider(int operand, int bytes, int part = 0) {
    made.in.push_back(slot(operand, part, bytes, true));
  }
  void out_predicate(int operand, int part = 0) { made.out.push_back(predicate(operand, part)); }
  void in_predicate(int operand, int part = 0) { made.in.push_back(predicate(operand, part)); }
  // The base of an address of `bytes`; its offset is returned.
  s64 address(int operand, int bytes);
  s64 immediate(int operand) const;
  s64 label(int operand) const;

 private:
  const Scalar& operand_part(int operand, int part) const;
  Slot slot(int operand, int part, int bytes, bool wider);
  Slot predicate(int operand, int part);

  const Statement& statement_;
  class Layout& layout_;
};

// Where registers and constants lie in a warp's file.
class Layout {
 public:
  explicit Layout(const std::vector<int>& register_bits);
  Slot reg(s64 index) const { return registers_.at(index); }
  bool is_predicate(s64 index) const { return bits_.at(index) == 1; }
  Slot constant(s64 value, u32 bytes, bool shared);
  Slot predicate_constant(bool value);
  Slot special(const std::string& name);
  void finish(Program& program) const;

 private:
  Slot add(u32 bytes, u32 size);
  std::vector<int> bits_;
  std::vector<Slot> registers_;
  std::map<std::tuple<s64, u32, bool>, Slot> constants_;
  std::map<std::string, Slot> specials_;
  std::vector<Slot> shared_;
  u32 size_ = 0;
};

using Family = std::function<void(Decoder&)>;

class Table {
 public:
  static const Table& instance();

  // A second one of the same name is an error.
  void add(const std::string& opcode, Family decode);
  void family(const std::string& mnemonic, Family decode);
  void decode(const Statement& statement, Instruction& made, Layout& layout) const;

 private:
  Table();
  std::unordered_map<std::string, Family> exact_, families_;
};

Program decode_program(const std::vector<int>& register_bits,
                       const std::vector<Statement>& statements);

}  // namespace ptx
