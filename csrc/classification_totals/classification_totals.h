// totals [3] += {mean_loss * B, correct answers, B}: what an epoch reports, summed where it lies.
#pragma once

#include "core/isa.h"
#include "core/scalar.h"

namespace skinfast {

// Whether the answer to one row of logits, the place of the first of its largest values, is
// `label`. NaN counts as larger than everything, as in torch.argmax.
template <typename T>
SKINFAST_HOST_DEVICE bool is_correct(const T* logits, int64_t classes, int64_t label) {
  int64_t best = 0;
  accumulate_t<T> largest = load(logits[0]);
  for (int64_t c = 1; c < classes; ++c) {
    const accumulate_t<T> value = load(logits[c]);
    if (largest == largest && !(value <= largest)) {
      largest = value;
      best = c;
    }
  }
  return best == label;
}

SKINFAST_DECLARE_KERNEL(int64_t count_correct(DType dtype, int64_t rows, int64_t classes,
                                              const void* logits, const int64_t* labels))

}  // namespace skinfast

#ifdef SKINFAST_HOST_CODE
#include "core/tensor.h"

namespace skinfast {

inline void check_classification_totals(const Tensor& totals, const Tensor& mean_loss,
                                        const Tensor& logits, const Tensor& labels) {
  constexpr const char* op = "classification_totals_";
  check_floating(op, "logits", logits);
  check_dim(op, "logits", logits, 2, "[B, C]");
  SKINFAST_CHECK(logits.size(1) >= 1, op, ": logits has shape ", shape_string(logits),
                 "; it needs at least one class");
  check_dtype(op, "totals", totals, ScalarType::Double);
  check_shape(op, "totals", totals, {3});
  SKINFAST_CHECK(totals.is_contiguous(), op, ": totals has gaps; it needs to be contiguous");
  check_dtype(op, "labels", labels, ScalarType::Long);
  check_shape(op, "labels", labels, {logits.size(0)});
  check_floating(op, "mean_loss", mean_loss);
  check_shape(op, "mean_loss", mean_loss, {});
  check_same_device(op, "totals", totals, "logits", logits);
  check_same_device(op, "labels", labels, "logits", logits);
  check_same_device(op, "mean_loss", mean_loss, "logits", logits);
}

}  // namespace skinfast
#endif
