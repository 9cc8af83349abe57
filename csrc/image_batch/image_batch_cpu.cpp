#include "image_batch/image_batch.h"

namespace skinfast::SKINFAST_ISA {
namespace {

constexpr int kPixels = 64;  // of a row, that go through the first cache together

int smaller(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// Not by a copy of three bytes: reading four that were not written together waits for the cache.
uint32_t word_of(const uint8_t* pixel) {
  return static_cast<uint32_t>(pixel[0] | pixel[1] << 8 | pixel[2] << 16);
}

// The columns [begin, begin + count) of a row whose first pixel is `pixels`, a word each: R, G and
// B from the lowest byte on, the highest byte is anything. Three bytes do not fit a vector's lanes;
// words do, and are moved in one instruction.
template <int kStep>
void unpack(const uint8_t* pixels, int64_t width, int64_t begin, int count, uint32_t* words) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  // Four pixels at once; where mirrored, the last of them comes first.
  constexpr Bytes order = kStep == -1 ? Bytes{9, 10, 11, 12, 6, 7, 8, 9, 3, 4, 5, 6, 0, 1, 2, 3}
                                      : Bytes{0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12};
  for (int i = 0; i < count;) {
    const int64_t column = begin + i;
    const uint8_t* first = pixels + 3 * (kStep == -1 ? -column - 3 : column);  // of four
    // Sixteen bytes are read where twelve are needed; memory may end behind the row's last pixel,
    // which a mirrored row begins with.
    const bool readable = kStep == -1 ? column >= 2 : column + 6 <= width;
    if (i + 4 <= count && readable) {
      Bytes bytes;
      memcpy(&bytes, first, sizeof(bytes));
#if defined(__clang__)
      Bytes shuffled{};
      for (int j = 0; j < 16; ++j) shuffled[j] = bytes[order[j]];
#else
      const Bytes shuffled = __builtin_shuffle(bytes, order);
#endif
      memcpy(words + i, &shuffled, sizeof(shuffled));
      i += 4;
    } else {
      words[i++] = word_of(pixels + 3 * kStep * column);
    }
  }
}

// The same where neighbours in the row are `step` pixels apart.
void gather(const uint8_t* pixels, int64_t step, int64_t begin, int count, uint32_t* words) {
  for (int i = 0; i < count; ++i) words[i] = word_of(pixels + 3 * step * (begin + i));
}

// output[i] = the normalised channel c of words[i].
template <typename T>
void normalise(const uint32_t* __restrict words, int count, int c, accumulate_t<T> scale,
               accumulate_t<T> shift, T* __restrict output) {
  for (int i = 0; i < count; ++i) {
    output[i] = image_value<T>(static_cast<int32_t>(words[i] >> (8 * c) & 0xff), scale, shift);
  }
}

// Calls `row(view, is_new, b, h, pixels)` for the rows [begin, end) of all images: row h of image
// b.
template <typename A, typename Row>
void for_each_row(const ImageBatch& call, int64_t begin, int64_t end, const Row& row) {
  for (int64_t b = begin / call.height; b * call.height < end; ++b) {
    const ImageView<A> view = image_view<A>(call, b);
    const int64_t first = b * call.height;
    const int64_t first_row = begin > first ? begin - first : 0;
    for (int64_t h = first_row; h < smaller(call.height, end - first); ++h) {
      row(view, h == first_row, b, h, view.pixels + 3 * h * view.row_step);
    }
  }
}

template <typename T>
void contiguous_rows(const ImageBatch& call, T* output, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t height = call.height, width = call.width;
  uint32_t words[kPixels];
  for_each_row<A>(call, begin, end,
                  [&](const auto& view, bool, int64_t b, int64_t h, const uint8_t* row) {
                    for (int64_t w = 0; w < width; w += kPixels) {
                      const int count = smaller(kPixels, width - w);
                      if (view.column_step == 1) {
                        unpack<1>(row, width, w, count, words);
                      } else if (view.column_step == -1) {
                        unpack<-1>(row, width, w, count, words);
                      } else {
                        gather(row, view.column_step, w, count, words);
                      }
                      for (int c = 0; c < 3; ++c) {
                        normalise(words, count, c, view.scale[c], view.shift[c],
                                  output + ((b * 3 + c) * height + h) * width + w);
                      }
                    }
                  });
}

template <typename T>
void channels_last_rows(const ImageBatch& call, T* output, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t width = call.width;
  A scale[kPixels * 3], shift[kPixels * 3];
  uint8_t gathered[kPixels * 3];
  for_each_row<A>(call, begin, end,
                  [&](const auto& view, bool is_new, int64_t b, int64_t h, const uint8_t* row) {
                    for (int i = 0; is_new && i < kPixels * 3; ++i) {
                      scale[i] = view.scale[i % 3];
                      shift[i] = view.shift[i % 3];
                    }
                    for (int64_t w = 0; w < width; w += kPixels) {
                      const int count = smaller(kPixels, width - w);
                      const uint8_t* pixel = row + w * view.column_step * 3;
                      const uint8_t* __restrict bytes = pixel;
                      if (view.column_step != 1) {
                        for (int i = 0; i < count; ++i)
                          memcpy(gathered + i * 3, pixel + i * view.column_step * 3, 3);
                        bytes = gathered;
                      }
                      T* __restrict out = output + ((b * call.height + h) * width + w) * 3;
                      for (int i = 0; i < count * 3; ++i)
                        out[i] = image_value<T>(bytes[i], scale[i], shift[i]);
                    }
                  });
}

template <typename T>
void rows(const ImageBatch& call, void* output, int64_t begin, int64_t end) {
  switch (call.layout) {
    case BatchLayout::kContiguous:
      return contiguous_rows(call, static_cast<T*>(output), begin, end);
    case BatchLayout::kChannelsLast:
      return channels_last_rows(call, static_cast<T*>(output), begin, end);
  }
}

}  // namespace

void image_batch(DType dtype, const ImageBatch& call, void* output, int64_t begin, int64_t end) {
  if (call.bytes) return rows<uint8_t>(call, output, begin, end);
  SKINFAST_CPU_DISPATCH(dtype, T, { rows<T>(call, output, begin, end); });
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
#include <algorithm>

#include "core/parallel.h"

namespace skinfast {
namespace {

// That every row has an image; the places are within `indices` by then.
void check_rows(const ImageBatch& call) {
  const int64_t first = call.clock[1], last = call.num_indices - call.batch;
  SKINFAST_CHECK(first >= 0 && first <= last, "image_batch: clock[1] has ", first,
                 "; for a batch of ", call.batch, " of ", call.num_indices,
                 " it needs at least 0 and at most ", last);
  for (int64_t i = first; i < first + call.batch; ++i) {
    SKINFAST_CHECK(call.indices[i] >= 0 && call.indices[i] < call.num_images,
                   "image_batch: indices[", i, "] has ", call.indices[i],
                   "; it needs at least 0 and less than ", call.num_images);
  }
}

std::tuple<Tensor, Tensor> image_batch_cpu(const Tensor& images, const Tensor& labels,
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
        check_rows(call);
        int64_t* const label = static_cast<int64_t*>(batch_labels.mutable_data_ptr());
        for (int64_t b = 0; b < call.batch; ++b) label[b] = image_label(call, b);
        if (output.numel() == 0) return;
        const int64_t rows = call.batch * call.height;
        const int64_t grain = std::max<int64_t>(1, kElementGrain * rows / output.numel());
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
