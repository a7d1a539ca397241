// Functions that are compiled for the host, and by nvcc for the device too.
#pragma once

#ifdef __CUDACC__
#define DPDIFF_BOTH __host__ __device__
#else
#define DPDIFF_BOTH
#endif
