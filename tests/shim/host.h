// The C interface of a kernel file built for the CPU. The builder appends a table `instances` before including this.
#pragma once
#include <cstring>

extern "C" {
// Sizes in bytes of an instance's parameters, for checking the arguments; returns their number, -1 if there is none.
int parameter_sizes(const char* name, int* sizes) {
  for (auto& known : instances)
    if (!strcmp(known.name, name)) {
      for (size_t i = 0; i < known.sizes.size(); i++) sizes[i] = (int)known.sizes[i];
      return (int)known.sizes.size();
    }
  return -1;
}
// Run a kernel; an empty string, or what went wrong.
const char* run(const char* name, const unsigned* grid, unsigned threads, unsigned shared_bytes, void** arguments,
                int schedule, int fault, int fault_line) {
  shim::fault = (shim::Fault)fault, shim::fault_line = fault_line;
  for (auto& known : instances)
    if (!strcmp(known.name, name)) {
      auto& entry = known.entry;
      shim::launch({grid[0], grid[1], grid[2]}, threads, shared_bytes, schedule, [&] { entry(arguments); });
      return shim::error.c_str();
    }
  return "no such instance";
}
}
