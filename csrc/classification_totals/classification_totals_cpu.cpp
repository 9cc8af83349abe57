#include "classification_totals/classification_totals.h"

namespace skinfast::SKINFAST_ISA {

int64_t count_correct(DType dtype, int64_t rows, int64_t classes, const void* logits,
                      const int64_t* labels) {
  int64_t correct = 0;
  SKINFAST_CPU_DISPATCH(dtype, T, {
    const T* row = static_cast<const T*>(logits);
    for (int64_t n = 0; n < rows; ++n, row += classes)
      correct += is_correct(row, classes, labels[n]);
  });
  return correct;
}

}  // namespace skinfast::SKINFAST_ISA

#ifdef SKINFAST_HOST_CODE
namespace skinfast {
namespace {

double value_of(const Tensor& number) {
  switch (dtype_of(number)) {
    case DType::kDouble:
      return *static_cast<const double*>(number.const_data_ptr());
    case DType::kBFloat16:
      return load(*static_cast<const BFloat16*>(number.const_data_ptr()));
    default:
      return *static_cast<const float*>(number.const_data_ptr());
  }
}

void classification_totals_cpu(const Tensor& totals, const Tensor& mean_loss, const Tensor& logits,
                               const Tensor& labels) {
  check_classification_totals(totals, mean_loss, logits, labels);
  const int64_t rows = logits.size(0);
  if (rows == 0) return;
  const Tensor stored = dense(logits, MemoryFormat::Contiguous);
  const Tensor stored_labels = dense(labels, MemoryFormat::Contiguous);
  const int64_t correct = SKINFAST_KERNEL(count_correct)(
      dtype_of(logits), rows, logits.size(1), stored.const_data_ptr(),
      static_cast<const int64_t*>(stored_labels.const_data_ptr()));
  double* sums = static_cast<double*>(totals.mutable_data_ptr());
  sums[0] += value_of(mean_loss) * static_cast<double>(rows);
  sums[1] += static_cast<double>(correct);
  sums[2] += static_cast<double>(rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(skinfast, CPU, m) {
  m.impl("classification_totals_", TORCH_BOX(&classification_totals_cpu));
}

}  // namespace skinfast
#endif
