#include "core/cuda.h"
#include "image_batch/image_batch.h"

namespace skinfast {
namespace {

// A block makes so many vectors of one image, each thread so many: enough that the draw, which one
// thread makes for all, is paid for, few enough that a batch feeds every multiprocessor.
constexpr uint32_t kVectorsPerThread = 2;
constexpr uint32_t kVectorsPerBlock = kVectorsPerThread * kThreads;
constexpr uint32_t kBlocks = 132 * 16;  // see grid_for()

// An index that names no image makes an image of NaN, of zeros in bytes: the host does not wait to
// check it.
template <typename T>
__device__ __forceinline__ T value_at(const ImageView<accumulate_t<T>>& view, uint32_t h,
                                      uint32_t w, uint32_t c) {
  using A = accumulate_t<T>;
  if (view.pixels == nullptr) {
    if constexpr (sizeof(T) == 1)
      return 0;
    else
      return store<T>(static_cast<A>(__builtin_nan("")));
  }
  const uint8_t byte = view.pixels[(h * view.row_step + w * view.column_step) * 3 + c];
  return image_value<T>(byte, view.scale[c], view.shift[c]);
}

// The values from `i` on of an image; the innermost dimension divides into vectors. Bytes are read
// one by one: threads of a warp share their cache lines, and four times as much is written.
template <typename T, int kWidth, BatchLayout kLayout>
__device__ __forceinline__ Vector<T, kWidth> values_at(const ImageView<accumulate_t<T>>& view,
                                                       uint32_t height, uint32_t width,
                                                       uint32_t i) {
  Vector<T, kWidth> values;
  if constexpr (kLayout == BatchLayout::kContiguous) {
    const uint32_t w = i % width;
    const uint32_t h = i / width % height;
    const uint32_t c = i / width / height;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values.values[k] = value_at<T>(view, h, w + k, c);
  } else {
    const uint32_t x = i % (width * 3);
    const uint32_t h = i / (width * 3);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      values.values[k] = value_at<T>(view, h, (x + k) / 3, (x + k) % 3);
    }
  }
  return values;
}

// A block makes the part blockIdx.x of an image of `vectors`, of one image after the other.
template <typename T, int kWidth, BatchLayout kLayout>
__global__ void __launch_bounds__(kThreads, 4)  // left alone, ptxas spills to fit more
    image_batch_kernel(ImageBatch call, T* output, int64_t* labels, uint32_t vectors) {
  using A = accumulate_t<T>;
  __shared__ ImageView<A> view;
  const uint32_t height = static_cast<uint32_t>(call.height);
  const uint32_t width = static_cast<uint32_t>(call.width);
  const uint32_t part = blockIdx.x;
  for (int64_t b = blockIdx.y; b < call.batch; b += gridDim.y) {
    if (threadIdx.x == 0) {
      view = image_view<A>(call, b);
      if (part == 0) labels[b] = image_label(call, b);
    }
    __syncthreads();
    Vector<T, kWidth>* image = reinterpret_cast<Vector<T, kWidth>*>(output) + b * vectors;
#pragma unroll
    for (uint32_t k = 0; k < kVectorsPerThread; ++k) {
      const uint32_t i = part * kVectorsPerBlock + k * kThreads + threadIdx.x;
      if (i < vectors) {
        image[i] = values_at<T, kWidth, kLayout>(view, height, width, i * kWidth);
      }
    }
    __syncthreads();  // before the next image's view
  }
}

template <typename T, int kWidth>
void launch_of_width(const ImageBatch& call, const Tensor& output, const Tensor& labels) {
  const uint32_t vectors = static_cast<uint32_t>(call.height * call.width * 3 / kWidth);
  // At least one, for the labels of images without pixels.
  const uint32_t parts = std::max(1u, (vectors + kVectorsPerBlock - 1) / kVectorsPerBlock);
  const unsigned images_at_once =
      std::min(grid_for(call.batch, 1).x, std::max(1u, kBlocks / parts));
  launch(call.layout == BatchLayout::kContiguous
             ? &image_batch_kernel<T, kWidth, BatchLayout::kContiguous>
             : &image_batch_kernel<T, kWidth, BatchLayout::kChannelsLast>,
         dim3(parts, images_at_once), kThreads, 0, current_stream(output), call,
         static_cast<T*>(output.mutable_data_ptr()),
         static_cast<int64_t*>(labels.mutable_data_ptr()), vectors);
}

template <typename T>
void launch_kernel(const ImageBatch& call, const Tensor& output, const Tensor& labels) {
  constexpr int wide = kVectorWidth<T>;
  const int64_t innermost = call.layout == BatchLayout::kContiguous ? call.width : call.width * 3;
  if (is_aligned(output.const_data_ptr()) && innermost % wide == 0) {
    launch_of_width<T, wide>(call, output, labels);
  } else {
    launch_of_width<T, 1>(call, output, labels);
  }
}

std::tuple<Tensor, Tensor> image_batch_cuda(const Tensor& images, const Tensor& labels,
                                            const Tensor& indices, const Tensor& draws,
                                            const Tensor& clock, int64_t batch_size,
                                            const Tensor& scale, const Tensor& shift,
                                            const std::optional<Tensor>& means, int64_t seed,
                                            bool mirror, bool rotate, double jitter,
                                            const std::string& layout, ScalarType dtype) {
  return image_batch_host(
      images, labels, indices, draws, clock, batch_size, scale, shift, means, seed, mirror, rotate,
      jitter, layout, dtype,
      [](const ImageBatch& call, const Tensor& output, const Tensor& batch_labels) {
        const DeviceGuard guard(output.get_device_index());
        if (call.bytes) return launch_kernel<uint8_t>(call, output, batch_labels);
        SKINFAST_CUDA_DISPATCH(dtype_of(output), T,
                               { launch_kernel<T>(call, output, batch_labels); });
      });
}

}  // namespace

SKINFAST_CUDA_LIBRARY_IMPL(m) { m.impl("image_batch", TORCH_BOX(&image_batch_cuda)); }

}  // namespace skinfast
