#include "head.hpp"

#include <cstring>
#include <stdexcept>
#include <utility>

namespace polydpo {
namespace {

constexpr int inputs_count = 10, max_registers = 64;
static_assert(sizeof(HeadInputs) == inputs_count * sizeof(Doubles));

}  // namespace

Head::Head(std::vector<Instruction> instructions, int loss, int slope)
    : instructions_(std::move(instructions)), loss_(loss), slope_(slope) {
    const int registers = inputs_count + static_cast<int>(instructions_.size());
    int defined = inputs_count;
    bool valid = registers <= max_registers && loss >= 0 && loss < registers && slope >= 0 && slope < registers;
    for (const Instruction& i : instructions_) {
        valid = valid && i.left >= 0 && i.left < defined && i.right >= 0 && i.right < defined;
        ++defined;
    }
    if (!valid) throw std::invalid_argument("head: a register does not exist");
}

POLYDPO_CLONES void Head::operator()(const HeadInputs& inputs, LossAndSlope& results) const {
    Doubles registers[max_registers];
    std::memcpy(registers, &inputs, sizeof inputs);
    Doubles* result = registers + inputs_count;
    for (const Instruction& i : instructions_) {
        const Doubles left = registers[i.left], right = registers[i.right];
        switch (i.operation) {
            case Operation::constant: *result = Doubles{} + i.constant; break;
            case Operation::add: *result = left + right; break;
            case Operation::subtract: *result = left - right; break;
            case Operation::multiply: *result = left * right; break;
            case Operation::divide: *result = left / right; break;
            case Operation::less: *result = left < right ? Doubles{} + 1 : Doubles{}; break;
        }
        ++result;
    }
    results = {registers[loss_], registers[slope_]};
}

}  // namespace polydpo
