// What every stage of decoding throws; caught once per image, where it becomes that image's message.
#pragma once

#include <stdexcept>

namespace polydpo {

struct DecodeError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace polydpo
