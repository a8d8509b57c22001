// Ops of a program whose weights stay the same from run to run: their arguments are checked and read once.
//
// Why: after a step has streamed all weights, what describes them (tensor, storage, sizes: 26 layers have 600 tensors)
// comes from memory, some 100 ns a line. Reading it anew for every token took 1 of 15 ms on two Zen 5 cores.
#pragma once

#include <ATen/core/ivalue.h>

#include <memory>
#include <string>
#include <vector>

namespace unicorn {

class Prepared {
 public:
  virtual ~Prepared() = default;
  // `changing`: the arguments at the places that `Preparation::changing` names.
  virtual void run(const c10::IValue* const* changing, c10::IValue* results) const = 0;
};

struct Preparation {
  std::string op;
  std::vector<size_t> changing;  // places of the arguments that may differ from run to run
  // From all arguments of one call. Null: these run through the dispatcher only (float weights).
  std::unique_ptr<Prepared> (*make)(const std::vector<c10::IValue>& arguments);
};

// Null for ops that are not worth it.
const Preparation* preparation_of(const std::string& op);

}  // namespace unicorn
