// What tests see of a crew.

#include "crew.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace headroom {
namespace {

// Which thread did each piece of each job, `[jobs, pieces]`, counted from 1; -1 if it was done twice. The
// piece of number `fails`, if there is one, cannot be done.
at::Tensor done_by_crew(int64_t threads, int64_t jobs, int64_t pieces, int64_t fails) {
  const at::Tensor done = at::zeros({jobs, pieces}, at::kLong);
  auto* by = done.mutable_data_ptr<int64_t>();
  Crew::gather(threads, [&] {
    for (int64_t job = 0; job < jobs; job++) {
      std::atomic<int64_t> next{job * pieces};
      Crew::share(threads, [&](int number) {
        for (int64_t piece; (piece = next++) < (job + 1) * pieces;) {
          TORCH_CHECK(piece != fails, "piece ", piece, " cannot be done");
          by[piece] = by[piece] ? -1 : number + 1;
        }
      });
    }
  });
  return done;
}

}  // namespace
}  // namespace headroom

TORCH_LIBRARY_FRAGMENT(headroom, library) {
  library.def("done_by_crew(int threads, int jobs, int pieces, int fails) -> Tensor",
              &headroom::done_by_crew);
}
