// Whether there is a device to launch on, and whether this build has code for it.
#include "common.cuh"
#include "ops.h"

namespace diffmoe {

namespace {

// Never launched: where the driver can load this kernel it can load all of them.
[[maybe_unused]] __global__ void probe_kernel() {}

}  // namespace

std::string why_no_device() {
#ifdef DIFFMOE_ON_CPU
  return "";
#else
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // else the next launch of this thread would report it
    return cudaGetErrorString(error);
  }
  return count ? "" : "there is no CUDA device";
#endif
}

std::string why_not_here() {
#ifdef DIFFMOE_ON_CPU
  return "";
#else
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
#endif
}

}  // namespace diffmoe
