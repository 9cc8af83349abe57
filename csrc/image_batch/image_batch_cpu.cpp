#include "image_batch/image_batch.h"

namespace skinfast::SKINFAST_ISA {
namespace {

constexpr int kPixels = 64;  // of a row, that go through the first cache together

int smaller(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// The columns [begin, begin + count) of a row, a word each: R, G and B from the lowest byte on, the
// highest byte is anything. Three bytes do not fit a vector's lanes; words do, and are moved in one
// instruction.
void unpack(const ImageRow& row, int64_t width, int64_t begin, int count, uint32_t* words) {
  const uint8_t* last = row.pixels + (width - 1) * 3;
  const uint8_t* pixel = row.pixels + image_column(row, width, begin) * 3;
  const int64_t step = row.mirrored ? -3 : 3;
  for (int i = 0; i < count; ++i, pixel += step) {
    uint32_t word = 0;
    memcpy(&word, pixel, pixel == last ? 3 : 4);  // behind the last pixel memory may end
    words[i] = word;
  }
}

// output[i] = the normalised channel c of words[i].
template <typename T>
void normalise(const uint32_t* __restrict words, int count, int c, const ImageBatch& call,
               T* __restrict output) {
  const accumulate_t<T> scale = call.scale[c], shift = call.shift[c];
  for (int i = 0; i < count; ++i) {
    output[i] = image_value<T>(static_cast<int32_t>(words[i] >> (8 * c) & 0xff), scale, shift);
  }
}

template <typename T>
void contiguous_rows(const ImageBatch& call, T* output, int64_t begin, int64_t end) {
  const int64_t height = call.height, width = call.width;
  uint32_t words[kPixels];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / height, h = unit % height;
    const ImageRow row = image_row(call, b, h);
    for (int64_t w = 0; w < width; w += kPixels) {
      const int count = smaller(kPixels, width - w);
      unpack(row, width, w, count, words);
      for (int c = 0; c < 3; ++c) {
        normalise(words, count, c, call, output + ((b * 3 + c) * height + h) * width + w);
      }
    }
  }
}

template <typename T>
void channels_last_rows(const ImageBatch& call, T* output, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t height = call.height, width = call.width;
  A scale[kPixels * 3], shift[kPixels * 3];
  for (int i = 0; i < kPixels * 3; ++i) {
    scale[i] = call.scale[i % 3];
    shift[i] = call.shift[i % 3];
  }
  uint8_t turned[kPixels * 3];
  for (int64_t unit = begin; unit < end; ++unit) {
    const ImageRow row = image_row(call, unit / height, unit % height);
    for (int64_t w = 0; w < width; w += kPixels) {
      const int count = smaller(kPixels, width - w);
      const uint8_t* __restrict bytes = row.pixels + w * 3;
      if (row.mirrored) {
        const uint8_t* pixel = row.pixels + (width - 1 - w) * 3;
        for (int i = 0; i < count; ++i) memcpy(turned + i * 3, pixel - i * 3, 3);
        bytes = turned;
      }
      T* __restrict out = output + (unit * width + w) * 3;
      for (int i = 0; i < count * 3; ++i) out[i] = image_value<T>(bytes[i], scale[i], shift[i]);
    }
  }
}

}  // namespace

void image_batch(DType dtype, const ImageBatch& call, void* output, int64_t begin, int64_t end) {
  SKINFAST_CPU_DISPATCH(dtype, T, {
    T* out = static_cast<T*>(output);
    switch (call.layout) {
      case BatchLayout::kContiguous:
        return contiguous_rows(call, out, begin, end);
      case BatchLayout::kChannelsLast:
        return channels_last_rows(call, out, begin, end);
    }
  });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include <algorithm>

#include "core/parallel.h"

namespace skinfast {
namespace {

void check_indices(const ImageBatch& call) {
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t index = call.indices[b];
    SKINFAST_CHECK(index >= 0 && index < call.num_images, "image_batch: indices[", b, "] has ",
                   index, "; it needs at least 0 and less than ", call.num_images);
  }
}

Tensor image_batch_cpu(const Tensor& images, const Tensor& indices, const Tensor& scale,
                       const Tensor& shift, const std::optional<Tensor>& flips,
                       const std::string& layout, ScalarType dtype) {
  return image_batch_host(images, indices, scale, shift, flips, layout, dtype,
                          [](const ImageBatch& call, const Tensor& output) {
                            check_indices(call);
                            const int64_t rows = call.batch * call.height;
                            const int64_t grain =
                                std::max<int64_t>(1, kElementGrain * rows / output.numel());
                            parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
                              SKINFAST_KERNEL(image_batch)
                              (dtype_of(output), call, output.mutable_data_ptr(), begin, end);
                            });
                          });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) { m.impl("image_batch", TORCH_BOX(&image_batch_cpu)); }

}  // namespace skinfast
#endif
