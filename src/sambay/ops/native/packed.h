// Calls of kernels as lists of words: a step that is always the same is then replayed by one call.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "parallel.h"

// A word is a pointer, an integer, or the bits of a double.
template <typename T>
static inline T from_word(int64_t word) {
  if constexpr (std::is_pointer<T>::value) {
    return reinterpret_cast<T>(word);
  } else if constexpr (std::is_same<T, double>::value) {
    double value;
    memcpy(&value, &word, sizeof value);
    return value;
  } else {
    return word;
  }
}

template <typename... A, size_t... I>
static inline void spread(void (*function)(A...), const int64_t* words, std::index_sequence<I...>) {
  function(from_word<A>(words[I])...);
}

template <typename... A>
static inline void call_packed(void (*function)(A...), const int64_t* words) {
  spread(function, words, std::index_sequence_for<A...>{});
}

// name_packed(words) is name(...) with its arguments in their order.
#define PACKED(name) \
  EXPORT void name##_packed(const int64_t* words) { call_packed(name, words); }
