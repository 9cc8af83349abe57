#include <limits>

#include "core/cuda.h"
#include "image_batch/image_batch.h"

namespace skinfast {
namespace {

// An index that names no image makes an image of NaN: the host does not wait to check it.
template <typename T>
__device__ __forceinline__ T value_at(const ImageBatch& call, const ImageRow& row, uint32_t w,
                                      uint32_t c) {
  using A = accumulate_t<T>;
  if (row.pixels == nullptr) return store<T>(static_cast<A>(__builtin_nan("")));
  const uint8_t byte = row.pixels[image_column(row, call.width, w) * 3 + c];
  return image_value<T>(byte, call.scale[c], call.shift[c]);
}

// Each thread makes kWidth neighbours in memory, from `i` on; the innermost dimension divides
// into those. Bytes are read one by one: threads of a warp share their cache lines, and four times
// as much is written.
template <typename T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> values_at(const ImageBatch& call, uint32_t i) {
  const uint32_t batch = static_cast<uint32_t>(call.batch);
  const uint32_t height = static_cast<uint32_t>(call.height);
  const uint32_t width = static_cast<uint32_t>(call.width);
  Vector<T, kWidth> values;
  if (call.layout == BatchLayout::kContiguous) {
    const uint32_t w = i % width;
    const uint32_t h = i / width % height;
    const uint32_t plane = i / width / height;
    const ImageRow row = image_row(call, plane / 3, h);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values.values[k] = value_at<T>(call, row, w + k, plane % 3);
  } else if (call.layout == BatchLayout::kChannelsLast) {
    const uint32_t x = i % (width * 3);
    const uint32_t y = i / (width * 3);
    const ImageRow row = image_row(call, y / height, y % height);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      values.values[k] = value_at<T>(call, row, (x + k) / 3, (x + k) % 3);
    }
  } else {
    const uint32_t b = i % batch;
    const uint32_t w = i / batch % width;
    const uint32_t y = i / batch / width;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      values.values[k] = value_at<T>(call, image_row(call, b + k, y % height), w, y / height);
    }
  }
  return values;
}

template <typename T, int kWidth>
__global__ void image_batch_kernel(ImageBatch call, T* output, uint32_t count) {
  const uint32_t stride = gridDim.x * blockDim.x;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
    reinterpret_cast<Vector<T, kWidth>*>(output)[i] = values_at<T, kWidth>(call, i * kWidth);
  }
}

int64_t innermost_size(const ImageBatch& call) {
  switch (call.layout) {
    case BatchLayout::kContiguous:
      return call.width;
    case BatchLayout::kChannelsLast:
      return call.width * 3;
    default:
      return call.batch;
  }
}

Tensor image_batch_cuda(const Tensor& images, const Tensor& indices, const Tensor& scale,
                        const Tensor& shift, const std::optional<Tensor>& flips,
                        const std::string& layout, ScalarType dtype) {
  return image_batch_host(
      images, indices, scale, shift, flips, layout, dtype,
      [](const ImageBatch& call, const Tensor& output) {
        const int64_t count = output.numel();
        SKINFAST_CHECK(count <= std::numeric_limits<int32_t>::max(), "image_batch: the result has ",
                       count, " values; on a GPU it needs at most 2147483647");
        const DeviceGuard guard(output.get_device_index());
        SKINFAST_CUDA_DISPATCH(dtype_of(output), T, {
          T* out = static_cast<T*>(output.mutable_data_ptr());
          constexpr int wide = kVectorWidth<T>;
          const int width = is_aligned(out) && innermost_size(call) % wide == 0 ? wide : 1;
          launch(width == 1 ? &image_batch_kernel<T, 1> : &image_batch_kernel<T, wide>,
                 grid_for(count / width), kThreads, 0, current_stream(output), call, out,
                 count / width);
        });
      });
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) { m.impl("image_batch", TORCH_BOX(&image_batch_cuda)); }

}  // namespace skinfast
