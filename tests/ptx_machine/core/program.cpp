#include "program.h"

#include <algorithm>

#include "opcodes.h"

namespace ptx {

Modifiers::Modifiers(const std::string& opcode) {
  for (size_t at = opcode.find('.'); at != std::string::npos;) {
    const size_t end = opcode.find('.', at + 1);
    left.push_back(opcode.substr(at + 1, end == std::string::npos ? end : end - at - 1));
    at = end;
  }
}

bool Modifiers::take(const std::string& name) {
  const auto found = std::find(left.begin(), left.end(), name);
  if (found == left.end()) return false;
  left.erase(found);
  return true;
}

int Modifiers::take_any(const std::vector<std::string>& names, int otherwise) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (take(names[i])) return static_cast<int>(i);
  }
  return otherwise;
}

int Modifiers::take_one(const std::vector<std::string>& names) {
  const int found = take_any(names, -1);
  if (found >= 0) return found;
  std::string all;
  for (const auto& name : names) all += " ." + name;
  throw Failure("it has none of" + all);
}

std::string Modifiers::take_type() {
  for (size_t i = left.size(); i-- > 0;) {
    if (type_bytes(left[i]) == 0) continue;
    const std::string type = left[i];
    left.erase(left.begin() + static_cast<long>(i));
    return type;
  }
  throw Failure("it names no known type");
}

int Modifiers::take_vector() { return 1 << take_any({"v1", "v2", "v4", "v8"}, 0); }

void Modifiers::take_cache_hints() {
  const auto is_hint = [](const std::string& name) {
    static const char* const kHints[] = {"ca", "cg", "cs", "lu", "cv", "wb", "wt"};
    if (std::find(std::begin(kHints), std::end(kHints), name) != std::end(kHints)) return true;
    return name.rfind("L1::", 0) == 0 || name.rfind("L2::", 0) == 0;
  };
  left.erase(std::remove_if(left.begin(), left.end(), is_hint), left.end());
}

void Modifiers::check_empty(const std::string& opcode) const {
  if (!left.empty()) throw Failure("unknown modifier ." + left[0] + " of " + opcode);
}

Decoder::Decoder(const Statement& statement, Instruction& made, Layout& layout)
    : modifiers(statement.opcode), made(made), statement_(statement), layout_(layout) {}

const Operand& Decoder::operand(int i) const {
  if (i >= operands()) throw Failure("too few operands");
  return statement_.operands[static_cast<size_t>(i)];
}

const Scalar& Decoder::operand_part(int i, int part) const {
  const auto& parts = operand(i).parts;
  if (part >= static_cast<int>(parts.size())) throw Failure("too short a vector");
  return parts[static_cast<size_t>(part)];
}

Slot Decoder::slot(int i, int part, int bytes, bool wider) {
  const Scalar& scalar = operand_part(i, part);
  switch (scalar.kind) {
    case 'r': {
      const Slot slot = layout_.reg(scalar.value);
      if (layout_.is_predicate(scalar.value)) throw Failure("a predicate in place of a value");
      if (wider ? slot.bytes < static_cast<u32>(bytes) : slot.bytes != static_cast<u32>(bytes)) {
        throw Failure("operand " + std::to_string(i) + " has a register of another size");
      }
      return slot;
    }
    case 'i':
      return layout_.constant(scalar.value, bytes, false);
    case 's':
      return layout_.constant(scalar.value, bytes, true);
    case 'x':
      return layout_.special(scalar.name);
    case '_':
      return {0, 0};
  }
  throw Failure("a label in place of a value");
}

Slot Decoder::predicate(int i, int part) {
  const Scalar& scalar = operand_part(i, part);
  if (scalar.kind == '_') return {0, 0};
  if (scalar.kind == 'i') return layout_.predicate_constant(scalar.value != 0);
  if (scalar.kind != 'r' || !layout_.is_predicate(scalar.value)) throw Failure("no predicate");
  return layout_.reg(scalar.value);
}

s64 Decoder::address(int i, int bytes) {
  if (!operand(i).address) throw Failure("operand " + std::to_string(i) + " is no address");
  made.in.push_back(slot(i, 0, bytes, false));
  return operand(i).offset;
}

s64 Decoder::immediate(int i) const {
  const Scalar& scalar = operand_part(i, 0);
  if (scalar.kind != 'i') throw Failure("operand " + std::to_string(i) + " is no immediate");
  return scalar.value;
}

s64 Decoder::label(int i) const {
  const Scalar& scalar = operand_part(i, 0);
  if (scalar.kind != 'l') throw Failure("operand " + std::to_string(i) + " is no label");
  return scalar.value;
}

Layout::Layout(const std::vector<int>& register_bits) : bits_(register_bits) {
  for (const int b : register_bits) {
    const u32 bytes = b == 1 ? 4 : static_cast<u32>(b) / 8;
    registers_.push_back(add(bytes, b == 1 ? 4 : bytes * kLanes));
  }
}

Slot Layout::add(u32 bytes, u32 size) {
  const Slot slot{size_, bytes};
  size_ += (size + 31) / 32 * 32;
  return slot;
}

Slot Layout::constant(s64 value, u32 bytes, bool shared) {
  const auto [found, fresh] = constants_.try_emplace({value, bytes, shared});
  if (fresh) {
    found->second = add(bytes, bytes * kLanes);
    if (shared) shared_.push_back(found->second);
  }
  return found->second;
}

Slot Layout::predicate_constant(bool value) { return constant(value ? -1 : 0, 4, false); }

Slot Layout::special(const std::string& name) {
  const auto [found, fresh] = specials_.try_emplace(name);
  if (fresh) found->second = add(name == "%clock64" || name == "%globaltimer" ? 8 : 4, 8 * kLanes);
  return found->second;
}

void Layout::finish(Program& program) const {
  program.file.assign(size_, 0xFF);  // NaN in every format
  for (const auto& [key, slot] : constants_) {
    const s64 value = std::get<0>(key);
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(&program.file[slot.at + slot.bytes * lane], &value, slot.bytes);
    }
  }
  program.shared_addresses = shared_;
  for (const auto& [name, slot] : specials_) program.specials.emplace_back(name, slot.at);
}

Table::Table() {
  add_arithmetic(*this);
  add_bits(*this);
  add_predicates(*this);
  add_conversions(*this);
  add_control(*this);
  add_memory(*this);
  add_atomics(*this);
  add_fences(*this);
  add_barriers(*this);
  add_cp_async(*this);
  add_tma(*this);
  add_mma(*this);
  add_wgmma(*this);
}

void Table::add(const std::string& opcode, Family decode) {
  if (!exact_.emplace(opcode, std::move(decode)).second)
    throw std::logic_error("opcode " + opcode + " is listed twice");
}

void Table::family(const std::string& mnemonic, Family decode) {
  if (!families_.emplace(mnemonic, std::move(decode)).second)
    throw std::logic_error("family " + mnemonic + " is listed twice");
}

const Table& Table::instance() {
  static const Table table;
  return table;
}

void Table::decode(const Statement& statement, Instruction& made, Layout& layout) const {
  Decoder decoder(statement, made, layout);
  if (const auto exact = exact_.find(statement.opcode); exact != exact_.end()) {
    exact->second(decoder);
    return;
  }
  // The longest listed beginning: "cp.async.bulk" before "cp.async".
  for (size_t end = statement.opcode.size(); end != std::string::npos && end > 0;
       end = statement.opcode.rfind('.', end - 1)) {
    const std::string mnemonic = statement.opcode.substr(0, end);
    const auto family = families_.find(mnemonic);
    if (family == families_.end()) continue;
    decoder.modifiers = Modifiers(statement.opcode.substr(mnemonic.size()));
    family->second(decoder);
    decoder.modifiers.check_empty(statement.opcode);
    return;
  }
  throw Failure("unknown opcode " + statement.opcode);
}

Program decode_program(const std::vector<int>& register_bits,
                       const std::vector<Statement>& statements) {
  Program program;
  Layout layout(register_bits);
  std::map<std::string, int> opcodes;
  for (const Statement& statement : statements) {
    Instruction made;
    made.line = statement.line;
    made.negated = statement.negated;
    made.opcode = opcodes.try_emplace(statement.opcode, opcodes.size()).first->second;
    if (statement.guard >= 0) made.guard = layout.reg(statement.guard).at;
    try {
      Table::instance().decode(statement, made, layout);
    } catch (const Failure& failure) {
      throw Failure("line " + std::to_string(statement.line) + ", " + statement.opcode + ": " +
                    failure.what());
    }
    program.code.push_back(std::move(made));
  }
  program.opcodes.resize(opcodes.size());
  for (const auto& [name, index] : opcodes) program.opcodes[static_cast<size_t>(index)] = name;
  layout.finish(program);
  return program;
}

}  // namespace ptx
