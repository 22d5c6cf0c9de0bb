// The machine's Python module: Program(registers, statements) and run(program, launch...).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"

namespace py = pybind11;

namespace {

using namespace ptx;

// As parse.py makes them: a part is (kind, value, name), an operand (parts, offset, is address).
Operand operand(const py::handle& given) {
  const auto tuple = py::cast<py::tuple>(given);
  Operand made;
  for (const py::handle part : tuple[0]) {
    const auto fields = py::cast<py::tuple>(part);
    made.parts.push_back({py::cast<std::string>(fields[0])[0], py::cast<s64>(fields[1]),
                          py::cast<std::string>(fields[2])});
  }
  made.offset = py::cast<s64>(tuple[1]);
  made.address = py::cast<bool>(tuple[2]);
  return made;
}

Program program(const std::vector<int>& registers, const py::list& statements) {
  std::vector<Statement> made;
  for (const py::handle given : statements) {
    Statement statement{py::cast<int>(given.attr("line")),
                        py::cast<int>(given.attr("guard")),
                        py::cast<bool>(given.attr("negated")),
                        py::cast<std::string>(given.attr("opcode")),
                        {}};
    for (const py::handle each : given.attr("operands"))
      statement.operands.push_back(operand(each));
    made.push_back(std::move(statement));
  }
  return decode_program(registers, made);
}

py::dict run(const Program& program, const std::vector<u32>& grid, u32 cluster, u32 threads,
             u32 shared_bytes, u32 resident, u32 seed, bool adversarial, u64 limit,
             const std::vector<std::tuple<u64, u64, bool>>& memory, const std::string& parameters) {
  Launch launch;
  std::copy(grid.begin(), grid.end(), launch.grid);
  launch.cluster = cluster;
  launch.threads = threads;
  launch.shared_bytes = shared_bytes;
  launch.resident = resident;
  launch.seed = seed;
  launch.adversarial = adversarial;
  launch.limit = limit;
  std::vector<Allocation> allocations;
  for (const auto& [base, bytes, writable] : memory)
    allocations.push_back({base, bytes, writable, {}});
  std::string failure;
  Machine machine(program, launch, std::move(allocations), {parameters.begin(), parameters.end()});
  {
    py::gil_scoped_release free;
    try {
      machine.run();
    } catch (const Failure& caught) {
      failure = caught.what();
    }
  }
  py::list counts;
  for (size_t i = 0; i < program.code.size(); ++i) {
    const Counts& c = machine.counts[i];
    counts.append(
        py::make_tuple(c.executed, c.lanes, c.sectors, c.bytes, c.wavefronts, c.fewest_wavefronts));
  }
  py::dict result;
  result["failure"] = failure;
  result["reports"] =
      py::cast(std::vector<std::string>(machine.races.found.begin(), machine.races.found.end()));
  result["counts"] = counts;
  result["instructions"] = machine.instructions;
  return result;
}

}  // namespace

PYBIND11_MODULE(_machine, module) {
  py::register_exception<Failure>(module, "PtxError", PyExc_RuntimeError);
  py::class_<Program>(module, "Program").def(py::init(&program));
  module.def("run", &run, py::arg("program"), py::kw_only(), py::arg("grid"), py::arg("cluster"),
             py::arg("threads"), py::arg("shared_bytes"), py::arg("resident"), py::arg("seed"),
             py::arg("adversarial"), py::arg("limit"), py::arg("memory"), py::arg("parameters"));
}
