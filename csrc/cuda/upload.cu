#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "upload.h"

namespace lightning_mat {
namespace {

// Arguments of a kernel may take 4 KB on every device.
struct Packet {
  static constexpr int kVectors = 240;
  uint4 vectors[kVectors];
};

__global__ void __launch_bounds__(Packet::kVectors)
    write_packet(const __grid_constant__ Packet packet, uint4* to, int count) {
  const int k = static_cast<int>(threadIdx.x);
  if (k < count) to[k] = packet.vectors[k];
}

}  // namespace

cudaError_t upload_by_arguments(const void* values, int64_t bytes, void* to, cudaStream_t stream) {
  const auto* from = static_cast<const unsigned char*>(values);
  auto* vectors = static_cast<uint4*>(to);
  for (int64_t done = 0; done < bytes; done += sizeof(Packet)) {
    const int64_t part = std::min<int64_t>(bytes - done, sizeof(Packet));
    Packet packet{};
    std::memcpy(packet.vectors, from + done, static_cast<size_t>(part));
    const int count = static_cast<int>((part + 15) / 16);
    write_packet<<<1, Packet::kVectors, 0, stream>>>(packet, vectors + done / 16, count);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lightning_mat
