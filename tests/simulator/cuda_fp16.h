// float16 for the simulator.
#pragma once

struct __half {
  _Float16 value;
};

inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
