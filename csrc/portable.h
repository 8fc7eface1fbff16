// For code that the host and the device both compile.

#pragma once

#ifdef __CUDACC__
#define LIGHTNING_MAT_INLINE __host__ __device__ inline
#else
#define LIGHTNING_MAT_INLINE inline
#endif
