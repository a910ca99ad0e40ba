// The scalar heads of the losses, as programs recorded from polydpo_fast/objectives.py.
#pragma once

#include <vector>

#include "floats.hpp"

namespace polydpo {

// Registers 0 ... 9 are these inputs, of eight pairs at a time; the result of instruction i goes to register 10 + i.
struct HeadInputs {
    Doubles z, p, q, nlp, nlq, beta, alpha[4];
};

enum class Operation : int { constant = 0, add = 1, subtract = 2, multiply = 3, divide = 4, less = 5 };

struct Instruction {
    Operation operation;
    int left, right;
    double constant;
};

struct LossAndSlope {
    Doubles loss, slope;
};

class Head {
public:
    // Throws std::invalid_argument where a register does not exist.
    Head(std::vector<Instruction> instructions, int loss, int slope);
    void operator()(const HeadInputs& inputs, LossAndSlope& results) const;

private:
    std::vector<Instruction> instructions_;
    int loss_, slope_;
};

}  // namespace polydpo
