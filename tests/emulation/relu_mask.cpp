// The ReLU mask in the epilogue of CUTLASS 3 (conv2d_relu_mask_sm90.h) for every thread of every
// tile of an output, in the layouts of registers that persistent128x64 has. Compiled where CUTLASS
// and the CUDA headers are.
#include <vector_types.h>

// What CUTLASS's headers name, and nothing here calls.
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
void __syncthreads();

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>

#include "conv2d/conv2d_relu_mask_sm90.h"

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion::detail;

using BlockTile = Shape<_128, _64, _64>;
using Element = cutlass::bfloat16_t;
using Epilogue = cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BlockTile, Shape<_1, _1, _1>,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element,
    cutlass::layout::RowMajor, 8, Element, cutlass::layout::RowMajor, 8,
    cutlass::epilogue::TmaWarpSpecialized>::CollectiveOp;
using Part = typename Epilogue::EpilogueTile;

}  // namespace

// Counts for each element of the output [rows, columns] the threads that have it, and those that
// let it pass. False where a thread lets something pass that lies beyond the output.
extern "C" __attribute__((visibility("default"))) bool relu_mask_passes(const uint8_t* bits,
                                                                        int rows, int columns,
                                                                        uint8_t* visits,
                                                                        uint8_t* passes) {
  constexpr int kThreads = 128;
  const auto multiply =
      make_tiled_mma(SM90_64x64x16_F32BF16BF16_SS<SM90::GMMA::Major::K, SM90::GMMA::Major::MN>{});
  const auto copy = make_tiled_copy_S(
      Copy_Atom<SM90_U32x4_STSM_N, Element>{},
      make_tiled_copy_C_atom(Copy_Atom<SM90_U32x4_STSM_N, cutlass::half_t>{}, multiply));
  const auto end = make_coord(rows, columns);
  for (int tile_m = 0; tile_m * size<0>(BlockTile{}) < rows; ++tile_m) {
    for (int tile_n = 0; tile_n * size<1>(BlockTile{}) < columns; ++tile_n) {
      for (int thread = 0; thread < kThreads; ++thread) {
        // As sm90_epilogue_tma_warpspecialized.hpp makes them.
        const auto tile = local_tile(make_identity_tensor(make_shape(rows, columns)),
                                     take<0, 2>(BlockTile{}), make_coord(tile_m, tile_n));
        const auto own = copy.get_slice(thread).partition_S(flat_divide(tile, Part{}));
        const auto relative = make_coord_tensor(own.layout());
        float source = 0.0f;
        const fusion::ConsumerStoreArgs arguments(
            make_shape(rows, columns, 8, 1), BlockTile{}, make_coord(tile_m, tile_n, 0, 0),
            multiply, Part{}, copy, make_coord_tensor(tile.layout()), end - tile(_0{}), relative,
            end - own(_0{}), source, thread);
        skinfast::ReLUMask mask({bits}, {});
        auto callbacks = mask.get_consumer_store_callbacks<true>(arguments);
        for (int part_n = 0; part_n < size<4>(own); ++part_n) {
          for (int part_m = 0; part_m < size<3>(own); ++part_m) {
            callbacks.begin_loop(part_m, part_n);
            constexpr int kWidth = size(Part{}) / kThreads;
            cutlass::Array<float, kWidth> ones;
            ones.fill(1.0f);
            const auto output = callbacks.visit(ones, 0, part_m, part_n, ones);
            const auto values = own(_, _, _, part_m, part_n);
            if (size(values) != kWidth) return false;
            for (int i = 0; i < kWidth; ++i) {
              const auto place = values(i);
              if (!elem_less(place, end)) {
                if (output[i] != 0.0f) return false;
                continue;
              }
              const int index = get<0>(place) * columns + get<1>(place);
              ++visits[index];
              passes[index] += output[i] == 1.0f;
            }
          }
        }
      }
    }
  }
  return true;
}
