// Replays a recorded step: the calls of a list one after another, without Python in between.
#include <cstdint>

#include "parallel.h"

// Of each call the address of a packed kernel, the number of its words, and those.
EXPORT void sambay_replay(const int64_t* list, int64_t calls) {
  using Packed = void (*)(const int64_t* words);
  for (; calls > 0; --calls) {
    reinterpret_cast<Packed>(list[0])(list + 2);
    list += 2 + list[1];
  }
}
