// A batch from a dataset kept as bytes: images gathered, mirrored, turned, recoloured and
// normalised, or left as bytes.
#pragma once

#include "core/isa.h"
#include "core/philox.h"
#include "core/scalar.h"

namespace skinfast {

// How output [B, 3, H, W] lies in memory: as that, or as [B, H, W, 3].
enum class BatchLayout { kContiguous, kChannelsLast };

struct ImageBatch {
  const uint8_t* images;   // [N, H, W, 3]
  const int64_t* labels;   // [N]
  const int64_t* indices;  // [M]
  const int64_t* draws;    // [M]
  const int64_t* clock;    // the epoch, and the place in `indices` of the batch's first image
  const float* means;      // [N, 3], of the bytes; null without jitter
  const float* scale;      // [3]
  const float* shift;      // [3]
  int64_t num_images, num_indices, batch, height, width;
  uint64_t seed;
  bool mirror, rotate;
  double jitter;
  BatchLayout layout;
  bool bytes;  // the batch's pixels are bytes, as they were
};

// What an image of the dataset becomes. Pixel (h, w) of the batch is at
// `pixels + 3 * (h * row_step + w * column_step)`; a byte of channel c becomes
// byte * scale[c] + shift[c].
template <typename A>
struct ImageView {
  const uint8_t* pixels;  // null where there is no such image
  int64_t row_step, column_step;
  A scale[3], shift[3];
};

// The image of row b; -1 where the clock or an index points beyond the end.
SKINFAST_HOST_DEVICE int64_t image_index(const ImageBatch& call, int64_t b) {
  const int64_t place = call.clock[1] + b;
  if (place < 0 || place >= call.num_indices) return -1;
  const int64_t index = call.indices[place];
  return index >= 0 && index < call.num_images ? index : -1;
}

// A label for what is no image: the NaN of its pixels shall reach the loss. Bytes have none, so
// there the label names no class, which makes the loss NaN too.
SKINFAST_HOST_DEVICE int64_t image_label(const ImageBatch& call, int64_t b) {
  const int64_t index = image_index(call, b);
  return index >= 0 ? call.labels[index] : call.bytes ? -1 : 0;
}

// All that is random in a batch. Word for word the same whatever is asked for, so that switching
// one change off leaves the others as they were.
template <typename A>
SKINFAST_HOST_DEVICE ImageView<A> image_view(const ImageBatch& call, int64_t b) {
  ImageView<A> view{};
  const int64_t index = image_index(call, b);
  if (index < 0 || call.height == 0 || call.width == 0) return view;
  const uint64_t draw = static_cast<uint64_t>(call.draws[call.clock[1] + b]);
  const auto words = [&](uint32_t block) {
    return philox({static_cast<uint32_t>(draw), static_cast<uint32_t>(draw >> 32),
                   static_cast<uint32_t>(call.clock[0]), block},
                  call.seed);
  };
  const bool random = call.mirror || call.rotate || call.jitter > 0;
  const PhiloxWords first = random ? words(0) : PhiloxWords{};

  // First mirrored, then turned counter-clockwise. An odd number of quarter turns exchanges rows
  // and columns; each turn reverses one of them.
  const uint32_t flips = call.mirror ? first.values[0] & 3 : 0;
  const uint32_t turns = call.rotate ? first.values[0] >> 2 & 3 : 0;
  const bool rows_reversed = (turns == 2 || turns == 3) != ((flips & 2) != 0);
  const bool columns_reversed = (turns == 1 || turns == 2) != ((flips & 1) != 0);
  const int64_t row_step = rows_reversed ? -call.width : call.width;
  const int64_t column_step = columns_reversed ? -1 : 1;
  const int64_t corner = (rows_reversed ? (call.height - 1) * call.width : 0) +
                         (columns_reversed ? call.width - 1 : 0);
  view.pixels = call.images + (index * call.height * call.width + corner) * 3;
  view.row_step = turns % 2 == 0 ? row_step : column_step;
  view.column_step = turns % 2 == 0 ? column_step : row_step;

  const PhiloxWords second = call.jitter > 0 ? words(1) : PhiloxWords{};
  for (int c = 0; c < 3; ++c) {
    double scale = call.scale[c], shift = call.shift[c];
    if (call.jitter > 0) {
      const double contrast = product(call.jitter, symmetric_uniform(first.values[1]));
      const double brightness = product(call.jitter, symmetric_uniform(second.values[0]));
      const double tint = product(call.jitter / 2, symmetric_uniform(second.values[1 + c]));
      const double mean = product(static_cast<double>(call.means[index * 3 + c]), scale);
      shift = shift - product(mean, contrast) + brightness + tint;
      scale = product(scale, 1.0 + contrast);
    }
    view.scale[c] = static_cast<A>(scale);
    view.shift[c] = static_cast<A>(shift);
  }
  return view;
}

// `byte` is an int, since a vector of those is converted in one instruction on every machine.
template <typename T>
SKINFAST_HOST_DEVICE T image_value(int32_t byte, accumulate_t<T> scale, accumulate_t<T> shift) {
  if constexpr (sizeof(T) == 1) {
    return static_cast<T>(byte);
  } else {
    return store<T>(product(static_cast<accumulate_t<T>>(byte), scale) + shift);
  }
}

// CPU kernel, on the rows [begin, end) of all images; bytes, which are no dtype here, are in
// `call`.
SKINFAST_DECLARE_KERNEL(void image_batch(DType dtype, const ImageBatch& call, void* output,
                                         int64_t begin, int64_t end))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include <limits>

#include "core/tensor.h"

namespace skinfast {

inline BatchLayout batch_layout_of(const std::string& layout) {
  if (layout == "contiguous") return BatchLayout::kContiguous;
  SKINFAST_CHECK(layout == "channels_last", "image_batch: layout is '", layout,
                 "'; it needs 'contiguous' or 'channels_last'");
  return BatchLayout::kChannelsLast;
}

// `launch(call, output, labels)` sees at least one row, whose image may have no pixels.
template <typename Launch>
std::tuple<Tensor, Tensor> image_batch_host(
    const Tensor& images, const Tensor& labels, const Tensor& indices, const Tensor& draws,
    const Tensor& clock, int64_t batch_size, const Tensor& scale, const Tensor& shift,
    const std::optional<Tensor>& means, int64_t seed, bool mirror, bool rotate, double jitter,
    const std::string& layout, ScalarType dtype, const Launch& launch) {
  constexpr const char* op = "image_batch";
  check_dtype(op, "images", images, ScalarType::Byte);
  SKINFAST_CHECK(images.dim() == 4 && images.size(3) == 3, op, ": images has shape ",
                 shape_string(images), "; it needs [N, H, W, 3]");
  // Copied here, a dataset would be copied for every batch.
  SKINFAST_CHECK(images.is_contiguous(), op,
                 ": images has gaps or another order in memory; it needs to be contiguous");
  SKINFAST_CHECK(images.size(1) * images.size(2) <= std::numeric_limits<int32_t>::max() / 3, op,
                 ": images has shape ", shape_string(images),
                 "; an image needs fewer than 2^31 bytes");
  check_dtype(op, "indices", indices, ScalarType::Long);
  check_dim(op, "indices", indices, 1, "[M]");
  check_same_device(op, "indices", indices, "images", images);
  const auto check_argument = [&](const char* name, const Tensor& tensor, ScalarType dtype,
                                  const std::vector<int64_t>& shape) {
    check_dtype(op, name, tensor, dtype);
    check_shape(op, name, tensor, shape);
    check_same_device(op, name, tensor, "images", images);
  };
  check_argument("labels", labels, ScalarType::Long, {images.size(0)});
  check_argument("draws", draws, ScalarType::Long, {indices.size(0)});
  check_argument("clock", clock, ScalarType::Long, {2});
  SKINFAST_CHECK(batch_size >= 0 && batch_size <= indices.size(0), op, ": batch_size is ",
                 batch_size, "; it needs at least 0 and at most ", indices.size(0),
                 ", the length of indices");
  check_argument("scale", scale, ScalarType::Float, {3});
  check_argument("shift", shift, ScalarType::Float, {3});
  SKINFAST_CHECK(jitter >= 0, op, ": color_jitter has the value ", jitter,
                 "; it needs one of at least 0");
  SKINFAST_CHECK(jitter == 0 || means, op,
                 ": color_jitter needs means, one of each channel of "
                 "every image");
  if (means) check_argument("means", *means, ScalarType::Float, {images.size(0), 3});
  SKINFAST_CHECK(!rotate || images.size(1) == images.size(2), op, ": images has shape ",
                 shape_string(images), "; to be turned an image needs to be square");
  const bool bytes = dtype == ScalarType::Byte;
  SKINFAST_CHECK(!bytes || jitter == 0, op, ": color_jitter has the value ", jitter,
                 " and the result dtype uint8; bytes keep their colours, so it needs 0");
  if (!bytes) check_floating(op, "the result", dtype, images.is_cuda());

  const auto contiguous = [](const Tensor& tensor) {
    return dense(tensor, MemoryFormat::Contiguous);
  };
  const Tensor dense_labels = contiguous(labels), dense_indices = contiguous(indices);
  const Tensor dense_draws = contiguous(draws), dense_clock = contiguous(clock);
  const Tensor dense_scale = contiguous(scale), dense_shift = contiguous(shift);
  std::optional<Tensor> dense_means;
  if (means) dense_means = contiguous(*means);
  const ImageBatch call{static_cast<const uint8_t*>(images.const_data_ptr()),
                        static_cast<const int64_t*>(dense_labels.const_data_ptr()),
                        static_cast<const int64_t*>(dense_indices.const_data_ptr()),
                        static_cast<const int64_t*>(dense_draws.const_data_ptr()),
                        static_cast<const int64_t*>(dense_clock.const_data_ptr()),
                        means ? static_cast<const float*>(dense_means->const_data_ptr()) : nullptr,
                        static_cast<const float*>(dense_scale.const_data_ptr()),
                        static_cast<const float*>(dense_shift.const_data_ptr()),
                        images.size(0),
                        indices.size(0),
                        batch_size,
                        images.size(1),
                        images.size(2),
                        static_cast<uint64_t>(seed),
                        mirror,
                        rotate,
                        jitter,
                        batch_layout_of(layout),
                        bytes};
  const MemoryFormat format = call.layout == BatchLayout::kChannelsLast ? MemoryFormat::ChannelsLast
                                                                        : MemoryFormat::Contiguous;
  const Tensor output = empty_in(images, {call.batch, 3, call.height, call.width}, format, dtype);
  const Tensor batch_labels = empty_in(labels, {call.batch}, MemoryFormat::Contiguous);
  if (call.batch > 0) launch(call, output, batch_labels);
  return {output, batch_labels};
}

}  // namespace skinfast
#endif
