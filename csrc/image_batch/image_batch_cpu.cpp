#include "image_batch/image_batch.h"

namespace skinfast::SKINFAST_ISA {
namespace {

constexpr int kPixels = 64;  // of a row, that go through the first cache together

int smaller(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// The columns [begin, begin + count) of a row, a word each: R, G and B from the lowest byte on, the
// highest byte is anything. Three bytes do not fit a vector's lanes; words do, and are moved in one
// instruction.
template <bool kMirrored>
void unpack(const ImageRow& row, int64_t width, int64_t begin, int count, uint32_t* words) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  // Four pixels at once; where mirrored, the last of them comes first.
  constexpr Bytes order = kMirrored ? Bytes{9, 10, 11, 12, 6, 7, 8, 9, 3, 4, 5, 6, 0, 1, 2, 3}
                                    : Bytes{0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12};
  const int64_t column = image_column(row, width, begin);
  constexpr int64_t step = kMirrored ? -1 : 1;
  for (int i = 0; i < count;) {
    const int64_t at = column + i * step;
    const int64_t first = kMirrored ? at - 3 : at;  // of four
    // Sixteen bytes are read where twelve are needed; behind the last pixel memory may end.
    if (i + 4 <= count && first >= 0 && first + 6 <= width) {
      Bytes pixels;
      memcpy(&pixels, row.pixels + first * 3, sizeof(pixels));
#if defined(__clang__)
      Bytes shuffled{};
      for (int j = 0; j < 16; ++j) shuffled[j] = pixels[order[j]];
#else
      const Bytes shuffled = __builtin_shuffle(pixels, order);
#endif
      memcpy(words + i, &shuffled, sizeof(shuffled));
      i += 4;
    } else {
      uint32_t word = 0;
      memcpy(&word, row.pixels + at * 3, 3);
      words[i++] = word;
    }
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
      (row.mirrored ? unpack<true> : unpack<false>)(row, width, w, count, words);
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
