// A lowered graph: dispatcher calls and integer arithmetic over numbered values, run without Python.
//
// Why: a decode step is some 150 calls. From generated Python one costs 10 to 30 us (argument parsing, the
// interpreter lock), from here about 1 us. unicorn_backend/graph/lower.py builds it.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>

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

  static void call(const c10::OperatorHandle& op, Stack& stack) {
    const std::string& name = op.operator_name().name;
    if (name.rfind("unicorn::", 0) != 0) return op.callBoxed(stack);
    const auto sizes = [&](size_t i) {
      return i < stack.size() && stack[i].isTensor() ? stack[i].toTensor().sizes().vec() : std::vector<int64_t>();
    };
    Event event{name, sizes(0), sizes(1), 0};
    const auto start = std::chrono::steady_clock::now();
    op.callBoxed(stack);
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

}  // namespace

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
    Step step{handle, nullptr, {}, values_, static_cast<int64_t>(schema.returns().size()), {}};
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
    Step step{{}, integer_functions().at(function), {}, values_, 1, {}};
    step.arguments = {{{a}, false, {}}, {{b}, false, {}}};
    return add(std::move(step));
  }

  // After the last step so far, these values are dropped.
  void drop(const std::vector<int64_t>& values) {
    for (const int64_t value : values) TORCH_CHECK(value >= 0 && value < values_, "program: no value ", value);
    steps_.back().dead = values;
  }

  void outputs(const std::vector<int64_t>& values) { outputs_ = values; }

  c10::List<IValue> run(const c10::List<IValue>& inputs) const {
    TORCH_CHECK(static_cast<int64_t>(inputs.size()) == inputs_, "program: got ", inputs.size(), " inputs, expected ",
                inputs_);
    try {
      return run_steps(inputs);
    } catch (const c10::IndexError& error) {  // a class of torch's reports every error as a RuntimeError: lower.py
      throw std::runtime_error(std::string("IndexError: ") + error.what_without_backtrace());
    } catch (const c10::ValueError& error) {
      throw std::runtime_error(std::string("ValueError: ") + error.what_without_backtrace());
    }
  }

  // Times the calls of all programs from here on, or no longer.
  static void trace(bool on) { Trace::on() = on; }
  static std::vector<Trace::Event> traced() { return Trace::take(); }

  static std::vector<std::string> functions() {
    std::vector<std::string> names;
    for (const auto& [name, function] : integer_functions()) names.push_back(name);
    return names;
  }

 private:
  struct Step {
    std::optional<c10::OperatorHandle> op;
    Binary function;
    std::vector<Argument> arguments;
    int64_t first, results;
    std::vector<int64_t> dead;
  };

  int64_t add(Step step) {
    values_ += step.results;
    steps_.push_back(std::move(step));
    return steps_.back().first;
  }

  const IValue& at(const std::vector<IValue>& values, int64_t number) const {
    return number < 0 ? constants_[~number] : values[number];
  }

  void push(Stack& stack, const std::vector<IValue>& values, const Argument& argument) const {
    if (!argument.list) {
      stack.push_back(as_argument(at(values, argument.from[0]), *argument.type));
      return;
    }
    c10::impl::GenericList list(argument.type);
    list.reserve(argument.from.size());
    for (const int64_t number : argument.from) list.push_back(as_argument(at(values, number), *argument.type));
    stack.push_back(std::move(list));
  }

  c10::List<IValue> run_steps(const c10::List<IValue>& inputs) const {
    // Without gradients the autograd kernels only pass on. Views are still tracked.
    std::optional<at::AutoDispatchBelowAutograd> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    std::vector<IValue> values(values_);
    for (int64_t i = 0; i < inputs_; ++i) values[i] = inputs.get(i);
    Stack stack;
    const bool traced = Trace::on().load(std::memory_order_relaxed);
    for (const Step& step : steps_) {
      if (step.function != nullptr) {
        values[step.first] = step.function(integer(at(values, step.arguments[0].from[0])),
                                           integer(at(values, step.arguments[1].from[0])));
      } else {
        stack.clear();
        for (const Argument& argument : step.arguments) push(stack, values, argument);
        traced ? Trace::call(*step.op, stack) : step.op->callBoxed(stack);
        for (int64_t i = 0; i < step.results; ++i) values[step.first + i] = std::move(stack[i]);
      }
      for (const int64_t dead : step.dead) values[dead] = IValue();
    }
    c10::List<IValue> results(c10::AnyType::get());
    results.reserve(outputs_.size());
    for (const int64_t number : outputs_) results.push_back(at(values, number));
    return results;
  }

  int64_t inputs_, values_;
  std::vector<IValue> constants_;
  std::vector<Step> steps_;
  std::vector<int64_t> outputs_;
};

}  // namespace unicorn

TORCH_LIBRARY_FRAGMENT(unicorn, m) {
  m.class_<unicorn::Program>("Program")
      .def(torch::init<int64_t>())
      .def("constant", &unicorn::Program::constant)
      .def("call", &unicorn::Program::call)
      .def("compute", &unicorn::Program::compute)
      .def("drop", &unicorn::Program::drop)
      .def("outputs", &unicorn::Program::outputs)
      .def("run", &unicorn::Program::run)
      .def_static("trace", &unicorn::Program::trace)
      .def_static("traced", &unicorn::Program::traced)
      .def_static("functions", &unicorn::Program::functions);
}
