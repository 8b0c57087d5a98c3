// The schemas and the CPU ops in one translation unit: torch's headers are most of its compile time, and are parsed
// once.
#include "cpu/bindings.h"
#include "schemas.h"
