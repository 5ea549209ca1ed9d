// Memory of one thread, cut in turn.
#pragma once
#include <stdlib.h>

#include <cstddef>

namespace {

class Arena {
   public:
    explicit Arena(size_t bytes) : base_((char*)aligned_alloc(64, (bytes + 63) / 64 * 64)), next_(base_) {}
    ~Arena() { free(base_); }
    template <class T>
    T* take(size_t count) {
        T* part = (T*)next_;
        next_ += (count * sizeof(T) + 63) / 64 * 64;
        return part;
    }
    void reset() { next_ = base_; }

   private:
    char *base_, *next_;
};

}  // namespace
