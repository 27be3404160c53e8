// Whether there is a device to launch on.
#include "common.cuh"
#include "ops.h"

namespace diffmoe {

std::string why_no_device() {
#ifdef DIFFMOE_ON_CPU
  return "";
#else
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count ? "" : "there is no CUDA device";
#endif
}

}  // namespace diffmoe
