// A lowered graph: dispatcher calls and integer arithmetic over numbered values, run without Python.
//
// Why: a decode step is some 150 calls. From generated Python one costs 10 to 30 us (argument parsing, the
// interpreter lock), from here about 1 us. unicorn_backend/graph/lower.py builds it. `bind` fixes some inputs, the
// weights, for many runs: what is computed with them alone is then prepared once (prepared.h).
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <malloc.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>

#include "mapped.h"
#include "prepared.h"
#include "screen.h"

namespace unicorn {

namespace {

using c10::IValue;
using torch::jit::Stack;

// One argument: a value, or (for list arguments) several. Negative numbers are constants: ~n.
struct Argument {
  std::vector<int64_t> from;
  bool list = false;
  c10::TypePtr type;  // of a list's elements, else of the argument
};

IValue as_argument(const IValue& value, const c10::Type& type) {
  if (type.kind() == c10::TypeKind::TensorType && value.isScalar()) {  // x + 1: eager makes the 1 a "wrapped number"
    at::Tensor number = at::scalar_to_tensor(value.toScalar());
    number.unsafeGetTensorImpl()->set_wrapped_number(true);
    return number;
  }
  if (type.kind() == c10::TypeKind::FloatType && value.isInt()) return static_cast<double>(value.toInt());
  return value;
}

c10::TypePtr without_optional(c10::TypePtr type) {
  const auto optional = type->cast<c10::OptionalType>();
  return optional ? optional->getElementType() : type;
}

// SymInt arguments are given as plain integers.
c10::TypePtr plain(const c10::TypePtr& type) {
  if (type->kind() == c10::TypeKind::SymIntType) return c10::IntType::get();
  if (type->kind() == c10::TypeKind::SymBoolType) return c10::BoolType::get();
  return type;
}

int64_t floor_divide(int64_t a, int64_t b) {
  TORCH_CHECK_VALUE(b != 0, "integer division by zero");
  return a / b - ((a % b != 0) && ((a < 0) != (b < 0)));
}

using Binary = IValue (*)(int64_t, int64_t);

// The names are those of Python's `operator` module and of torch's sym_ functions.
const std::unordered_map<std::string, Binary>& integer_functions() {
  static const std::unordered_map<std::string, Binary> functions = {
      {"add", [](int64_t a, int64_t b) { return IValue(a + b); }},
      {"sub", [](int64_t a, int64_t b) { return IValue(a - b); }},
      {"mul", [](int64_t a, int64_t b) { return IValue(a * b); }},
      {"floordiv", [](int64_t a, int64_t b) { return IValue(floor_divide(a, b)); }},
      {"mod", [](int64_t a, int64_t b) { return IValue(a - b * floor_divide(a, b)); }},
      {"sym_min", [](int64_t a, int64_t b) { return IValue(a < b ? a : b); }},
      {"sym_max", [](int64_t a, int64_t b) { return IValue(a > b ? a : b); }},
      {"eq", [](int64_t a, int64_t b) { return IValue(a == b); }},
      {"ne", [](int64_t a, int64_t b) { return IValue(a != b); }},
      {"lt", [](int64_t a, int64_t b) { return IValue(a < b); }},
      {"le", [](int64_t a, int64_t b) { return IValue(a <= b); }},
      {"gt", [](int64_t a, int64_t b) { return IValue(a > b); }},
      {"ge", [](int64_t a, int64_t b) { return IValue(a >= b); }},
  };
  return functions;
}

int64_t integer(const IValue& value) { return value.isBool() ? static_cast<int64_t>(value.toBool()) : value.toInt(); }

// What `Program.trace(True)` turns on: the time of every call of our own ops, with what tells its size. Off, it costs
// a run one load. Two reads of the clock take some 50 ns.
class Trace {
 public:
  // (op, sizes of its first and of its second argument where these are tensors, ns)
  using Event = std::tuple<std::string, std::vector<int64_t>, std::vector<int64_t>, int64_t>;

  static std::atomic<bool>& on() {
    static std::atomic<bool> on{false};
    return on;
  }

  // Runs `body`. `first` and `second` are its arguments, null where there are none.
  template <class Body>
  static void call(const std::string& name, const IValue* first, const IValue* second, const Body& body) {
    if (name.rfind("unicorn::", 0) != 0) return body();
    const auto sizes = [](const IValue* value) {
      return value != nullptr && value->isTensor() ? value->toTensor().sizes().vec() : std::vector<int64_t>();
    };
    Event event{name, sizes(first), sizes(second), 0};
    const auto start = std::chrono::steady_clock::now();
    body();
    const auto time = std::chrono::steady_clock::now() - start;
    std::get<3>(event) = std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
    const std::lock_guard<std::mutex> lock(mutex());
    events().push_back(std::move(event));
  }

  static std::vector<Event> take() {
    const std::lock_guard<std::mutex> lock(mutex());
    return std::exchange(events(), {});
  }

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::vector<Event>& events() {
    static std::vector<Event> events;
    return events;
  }
};

// One call of a graph, of an operator or of an integer function.
struct Step {
  std::optional<c10::OperatorHandle> op;
  Binary function;
  std::vector<Argument> arguments;
  int64_t first, results;
  std::vector<int64_t> dead;  // values that nothing reads after this step
  const Preparation* preparation;
};

// glibc returns memory to the system as soon as little more than one token's scores (1 MB in fp32) is free, and every
// page that it gets back costs a fault and 4 KB of zeros: 0.2 of 16.5 ms per token of the 1B. From here on it has the
// limits that it comes to by itself when a program frees one piece of 32 MB.
void keep_freed_memory() {
#if defined(__GLIBC__)
  static const bool kept = mallopt(M_MMAP_THRESHOLD, 32 << 20) != 0 && mallopt(M_TRIM_THRESHOLD, 64 << 20) != 0;
  static_cast<void>(kept);
#endif
}

// True where nobody but the kernel wants to see a call: no gradients, profiler or dispatch mode.
bool unobserved() {
  return !at::GradMode::is_enabled() && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
}

}  // namespace

class Bound;

class Program : public torch::CustomClassHolder {
 public:
  // Values 0 .. inputs - 1 are the inputs of `run`.
  explicit Program(int64_t inputs) : inputs_(inputs), values_(inputs) {}

  // The number to name a constant by.
  int64_t constant(IValue value) {
    constants_.push_back(std::move(value));
    return ~static_cast<int64_t>(constants_.size() - 1);
  }

  // A dispatcher call with all arguments of the schema in order; `counts[i]` is -1 for a single argument, else
  // the length of a list; `from` has their values one after another. Returns the number of its first result.
  int64_t call(const std::string& op, const std::string& overload, const std::vector<int64_t>& counts,
               const std::vector<int64_t>& from) {
    const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(op.c_str(), overload.c_str());
    const auto& schema = handle.schema();
    TORCH_CHECK(counts.size() == schema.arguments().size(), "program: ", schema, " got ", counts.size(), " arguments");
    Step step{handle, nullptr, {}, values_, static_cast<int64_t>(schema.returns().size()), {}, preparation_of(op)};
    auto next = from.begin();
    for (size_t i = 0; i < counts.size(); ++i) {
      Argument argument;
      argument.type = without_optional(schema.arguments()[i].type());
      argument.list = counts[i] >= 0;
      if (argument.list) argument.type = plain(argument.type->expectRef<c10::ListType>().getElementType());
      const int64_t count = argument.list ? counts[i] : 1;
      argument.from.assign(next, next + count);
      next += count;
      step.arguments.push_back(std::move(argument));
    }
    return add(std::move(step));
  }

  // An integer function of two values. Returns the number of the result.
  int64_t compute(const std::string& function, int64_t a, int64_t b) {
    Step step{{}, integer_functions().at(function), {}, values_, 1, {}, nullptr};
    step.arguments = {{{a}, false, {}}, {{b}, false, {}}};
    return add(std::move(step));
  }

  // After the last step so far, these values are dropped.
  void drop(const std::vector<int64_t>& values) {
    for (const int64_t value : values) TORCH_CHECK(value >= 0 && value < values_, "program: no value ", value);
    steps_.back().dead = values;
  }

  void outputs(const std::vector<int64_t>& values) { outputs_ = values; }

  // Runs with these inputs at these places, and what is given to `Bound::run` at the others. `sizes` has three numbers
  // for each input that is a size of another one, and not given: its place, the tensor's place, the dimension.
  static c10::intrusive_ptr<Bound> bind(const c10::intrusive_ptr<Program>& program, const std::vector<int64_t>& places,
                                        const c10::List<IValue>& inputs, const std::vector<int64_t>& sizes);

  // Times the calls of all programs from here on, or no longer.
  static void trace(bool on) { Trace::on() = on; }
  static std::vector<Trace::Event> traced() { return Trace::take(); }

  static std::vector<std::string> functions() {
    std::vector<std::string> names;
    for (const auto& [name, function] : integer_functions()) names.push_back(name);
    return names;
  }

 private:
  friend class Bound;

  int64_t add(Step step) {
    values_ += step.results;
    steps_.push_back(std::move(step));
    return steps_.back().first;
  }

  int64_t inputs_, values_;
  std::vector<IValue> constants_;
  std::vector<Step> steps_;
  std::vector<int64_t> outputs_;
};

class Bound : public torch::CustomClassHolder {
 public:
  Bound(c10::intrusive_ptr<Program> program, std::vector<int64_t> places, c10::List<IValue> inputs,
        std::vector<int64_t> sizes)
      : program_(std::move(program)), places_(std::move(places)), inputs_(std::move(inputs)), sizes_(std::move(sizes)) {
    TORCH_CHECK(places_.size() == inputs_.size() && sizes_.size() % 3 == 0, "program: got ", inputs_.size(),
                " inputs for ", places_.size(), " places and ", sizes_.size(), " numbers of sizes");
    keep_freed_memory();
    values_.resize(program_->values_);
    fixed_.resize(program_->values_);
    std::vector<bool> given(program_->inputs_);
    const auto take = [&](int64_t place) {
      TORCH_CHECK(place >= 0 && place < program_->inputs_ && !given[place], "program: no input ", place);
      given[place] = true;
    };
    for (size_t i = 0; i < places_.size(); ++i) {
      take(places_[i]);
      values_[places_[i]] = inputs_.get(i);
      fixed_[places_[i]] = true;
    }
    for (size_t i = 0; i < sizes_.size(); i += 3) {
      take(sizes_[i]);
      TORCH_CHECK(sizes_[i + 1] >= 0 && sizes_[i + 1] < program_->inputs_, "program: no input ", sizes_[i + 1]);
    }
    for (int64_t i = 0; i < program_->inputs_; ++i) {
      if (!given[i]) open_.push_back(i);
    }
    prepared_.resize(program_->steps_.size());
    for (size_t i = 0; i < prepared_.size(); ++i) {
      prepared_[i].can = can_prepare(program_->steps_[i]);
      if (prepared_[i].can) note_files(i);
    }
    head_ = find_head();
  }

  // The fixed packed weight of a linear whose result only leaves the graph: the model's head. Empty: there is none.
  std::vector<at::Tensor> head() const {
    if (head_ < 0) return {};
    std::vector<at::Tensor> weights;
    for (const int64_t number : program_->steps_[head_].arguments[1].from) weights.push_back(at(number).toTensor());
    return weights;
  }

  // Screens that head's rows in runs that want the best scores only.
  void screen(const c10::intrusive_ptr<Screen>& screen) {
    TORCH_CHECK(head_ >= 0, "program: no head to screen");
    screened_.emplace(head(), at(program_->steps_[head_].arguments[3].from[0]).toInt(), screen);
  }

  // best: 0, or how many of the largest scores of the head are wanted; the others may come back as -inf.
  c10::List<IValue> run(const c10::List<IValue>& inputs, int64_t best) {
    TORCH_CHECK(inputs.size() == open_.size(), "program: got ", inputs.size(), " inputs, expected ", open_.size());
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return Bound(program_, places_, inputs_, sizes_).run(inputs, 0);  // another thread is in it
    try {
      best_ = best;
      return run_steps(inputs);
    } catch (const c10::IndexError& error) {  // a class of torch's reports every error as a RuntimeError: lower.py
      throw std::runtime_error(std::string("IndexError: ") + error.what_without_backtrace());
    } catch (const c10::ValueError& error) {
      throw std::runtime_error(std::string("ValueError: ") + error.what_without_backtrace());
    }
  }

 private:
  // A step's prepared op, made when it first runs.
  struct Slot {
    bool can = false;
    std::unique_ptr<Prepared> op;
  };

  // What is not fixed goes when a run ends, however it ends.
  struct Sweep {
    Bound& bound;
    ~Sweep() {
      for (size_t i = 0; i < bound.values_.size(); ++i) {
        if (!bound.fixed_[i]) bound.values_[i] = IValue();
      }
    }
  };

  bool can_prepare(const Step& step) const {
    if (step.preparation == nullptr) return false;
    const std::vector<size_t>& changing = step.preparation->changing;
    for (size_t i = 0; i < step.arguments.size(); ++i) {
      if (std::find(changing.begin(), changing.end(), i) != changing.end()) continue;
      for (const int64_t number : step.arguments[i].from) {
        if (number >= 0 && !fixed_[number]) return false;
      }
    }
    return true;
  }

  // Weights of a prepared step that stay in files. (An embedding reads a few rows of its own, and is not prepared.)
  void note_files(size_t i) {
    for (const Argument& argument : program_->steps_[i].arguments) {
      for (const int64_t number : argument.from) {
        const IValue& value = at(number);
        const InFile where = value.isTensor() ? in_file(value.toTensor()) : InFile::no;
        if (where == InFile::no) continue;
        files_.add(i, value.toTensor().const_data_ptr(), value.toTensor().nbytes(), where == InFile::passing);
      }
    }
  }

  const IValue& at(int64_t number) const { return number < 0 ? program_->constants_[~number] : values_[number]; }

  void push(Stack& stack, const Argument& argument) const {
    if (!argument.list) {
      stack.push_back(as_argument(at(argument.from[0]), *argument.type));
      return;
    }
    c10::impl::GenericList list(argument.type);
    list.reserve(argument.from.size());
    for (const int64_t number : argument.from) list.push_back(as_argument(at(number), *argument.type));
    stack.push_back(std::move(list));
  }

  void fill(Stack& stack, const Step& step) const {
    stack.clear();
    for (const Argument& argument : step.arguments) push(stack, argument);
  }

  // A prepared op, or false: it goes through the dispatcher.
  bool run_prepared(const Step& step, Slot& slot, Stack& stack) {
    if (slot.op == nullptr) {
      fill(stack, step);
      slot.op = step.preparation->make(stack);
      slot.can = slot.op != nullptr;
      if (!slot.can) return false;
    }
    constexpr size_t kMost = 8;
    const IValue* changing[kMost];
    const std::vector<size_t>& places = step.preparation->changing;
    TORCH_INTERNAL_ASSERT(places.size() <= kMost);
    for (size_t i = 0; i < places.size(); ++i) changing[i] = &at(step.arguments[places[i]].from[0]);
    slot.op->run(changing, &values_[step.first]);
    return true;
  }

  // A linear with packed weights and no bias whose result is only an output.
  int64_t find_head() const {
    for (size_t i = 0; i < program_->steps_.size(); ++i) {
      const Step& step = program_->steps_[i];
      if (!step.op || step.op->operator_name().name != "unicorn::linear" || !prepared_[i].can) continue;
      const auto reads = [&](const Step& other) {
        return std::any_of(other.arguments.begin(), other.arguments.end(), [&](const Argument& a) {
          return std::find(a.from.begin(), a.from.end(), step.first) != a.from.end();
        });
      };
      const auto& out = program_->outputs_;
      const bool leaves = std::find(out.begin(), out.end(), step.first) != out.end();
      const bool plain = at(step.arguments[2].from[0]).isNone() && step.arguments[1].from.size() > 1;
      if (leaves && plain && std::none_of(program_->steps_.begin(), program_->steps_.end(), reads)) {
        return static_cast<int64_t>(i);
      }
    }
    return -1;
  }

  bool run_screened(const Step& step) {
    if (best_ == 0 || !screened_ || &step != &program_->steps_[head_]) return false;
    std::optional<at::Tensor> scores = (*screened_)(at(step.arguments[0].from[0]).toTensor(), best_);
    if (scores) values_[step.first] = std::move(*scores);
    return scores.has_value();
  }

  void run_step(const Step& step, Slot& slot, Stack& stack, bool direct) {
    if (direct && run_screened(step)) return;
    if (direct && slot.can && run_prepared(step, slot, stack)) return;
    fill(stack, step);
    step.op->callBoxed(stack);
    for (int64_t i = 0; i < step.results; ++i) values_[step.first + i] = std::move(stack[i]);
  }

  const IValue* single(const Step& step, size_t place) const {
    return place < step.arguments.size() && !step.arguments[place].list ? &at(step.arguments[place].from[0]) : nullptr;
  }

  c10::List<IValue> run_steps(const c10::List<IValue>& inputs) {
    // Without gradients the autograd kernels only pass on. Views are still tracked.
    std::optional<at::AutoDispatchBelowAutograd> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    const Sweep sweep{*this};
    for (size_t i = 0; i < open_.size(); ++i) values_[open_[i]] = inputs.get(i);
    for (size_t i = 0; i < sizes_.size(); i += 3) {
      values_[sizes_[i]] = values_[sizes_[i + 1]].toTensor().size(sizes_[i + 2]);
    }
    Stack stack;
    files_.begin();
    const bool traced = Trace::on().load(std::memory_order_relaxed), direct = unobserved();
    for (size_t i = 0; i < program_->steps_.size(); ++i) {
      const Step& step = program_->steps_[i];
      files_.before(i);
      if (step.function != nullptr) {
        values_[step.first] =
            step.function(integer(at(step.arguments[0].from[0])), integer(at(step.arguments[1].from[0])));
      } else if (traced) {
        Trace::call(step.op->operator_name().name, single(step, 0), single(step, 1),
                    [&] { run_step(step, prepared_[i], stack, direct); });
      } else {
        run_step(step, prepared_[i], stack, direct);
      }
      files_.after();
      for (const int64_t dead : step.dead) {
        if (!fixed_[dead]) values_[dead] = IValue();
      }
    }
    c10::List<IValue> results(c10::AnyType::get());
    results.reserve(program_->outputs_.size());
    for (const int64_t number : program_->outputs_) results.push_back(at(number));
    return results;
  }

  c10::intrusive_ptr<Program> program_;
  std::vector<int64_t> places_;
  c10::List<IValue> inputs_;
  std::vector<int64_t> sizes_;
  std::vector<IValue> values_;  // by number; between runs only the fixed ones
  std::vector<bool> fixed_;
  std::vector<int64_t> open_;  // the inputs that `run` is given
  std::vector<Slot> prepared_;
  FileReads files_;
  int64_t head_ = -1;  // a step
  std::optional<ScreenedLinear> screened_;
  int64_t best_ = 0;  // of the run that goes on
  std::mutex mutex_;
};

c10::intrusive_ptr<Bound> Program::bind(const c10::intrusive_ptr<Program>& program, const std::vector<int64_t>& places,
                                        const c10::List<IValue>& inputs, const std::vector<int64_t>& sizes) {
  return c10::make_intrusive<Bound>(program, places, inputs, sizes);
}

}  // namespace unicorn

TORCH_LIBRARY_FRAGMENT(unicorn, m) {
  m.class_<unicorn::Screen>("Screen")
      .def(torch::init<std::vector<at::Tensor>>())
      .def("bytes", &unicorn::Screen::bytes)
      .def("read", &unicorn::Screen::read);
  m.class_<unicorn::Bound>("Bound")
      .def("run", &unicorn::Bound::run)
      .def("head", &unicorn::Bound::head)
      .def("screen", &unicorn::Bound::screen);
  m.class_<unicorn::Program>("Program")
      .def(torch::init<int64_t>())
      .def("constant", &unicorn::Program::constant)
      .def("call", &unicorn::Program::call)
      .def("compute", &unicorn::Program::compute)
      .def("drop", &unicorn::Program::drop)
      .def("outputs", &unicorn::Program::outputs)
      .def("bind", &unicorn::Program::bind)
      .def_static("trace", &unicorn::Program::trace)
      .def_static("traced", &unicorn::Program::traced)
      .def_static("functions", &unicorn::Program::functions);
}
