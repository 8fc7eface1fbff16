// The kernel that copies boxes in the emulator, as a library that
// tests/optim/test_emulated_boxes.py calls. The function returns null, or what went wrong.

#include "boxes.h"

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/boxes_kernel.h"
#include "cuda/device.h"

namespace lightning_mat {

extern "C" const char* run_boxes(void* const* fulls, const BoxRecord* records, int64_t count,
                                 void* flat, int64_t item, int64_t gather, int64_t seed) {
  static std::string error;
  std::vector<BoxCopy> copies;
  int64_t words = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (records[k].rows == 0 || records[k].run == 0) continue;
    copies.push_back(box_copy(records[k], fulls[records[k].full], flat, item, words));
    words += copies.back().rows * copies.back().run;
  }
  const BoxesParams p{copies.data(), static_cast<int64_t>(copies.size()), words, gather != 0};
  try {
    emulator::Options options{};
    options.seed = static_cast<decltype(options.seed)>(seed);
    if (words > 0) {
      emulator::launch(boxes_kernel, static_cast<unsigned>(boxes_blocks(p)), kBoxesThreads, 0,
                       options, p);
    }
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

}  // namespace lightning_mat
