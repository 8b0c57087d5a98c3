// The schemas and the ops in one translation unit: torch's headers, most of its compile time, are parsed once.
#include "bindings.h"
#include "schemas.h"
