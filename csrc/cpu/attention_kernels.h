#include "attention_tiles.h"

#include "attention_backward.h"
#include "attention_forward.h"
