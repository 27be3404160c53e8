// The extension's table of contents. Tensors come as addresses (`tensor.data_ptr()`, 0 for None), the stream as torch
// gives it (`torch.cuda.current_stream().cuda_stream`): no torch header, so one build serves every version of torch.
#ifdef DIFFMOE_ON_CPU
#include <pybind11/functional.h>
#endif
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace py = pybind11;
using Released = py::call_guard<py::gil_scoped_release>;  // a full queue of launches makes only its own thread wait

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels of diffmoe_kernels in CUDA C++.";
#ifdef DIFFMOE_ON_CPU
  module.attr("on_cpu") = true;
  module.def("set_runner", &on_cpu::set_runner);
  module.def("set_thread_order", &on_cpu::set_thread_order);
  module.def("take_launched", &on_cpu::take_launched);
#else
  module.attr("on_cpu") = false;
#endif
  module.def("why_no_device", &diffmoe::why_no_device);
  module.def("why_not_here", &diffmoe::why_not_here);

  module.def("permute_fwd", &diffmoe::permute_fwd, Released());
  module.def("unpermute_fwd", &diffmoe::unpermute_fwd, Released());
  module.def("unpermute_bwd", &diffmoe::unpermute_bwd, Released());

  module.def("router_chunks", &diffmoe::router_chunks);
  module.def("router_topk_fwd", &diffmoe::router_topk_fwd, Released());
  module.def("router_topk_bwd", &diffmoe::router_topk_bwd, Released());

  module.def("token_drop_chunks", &diffmoe::token_drop_chunks);
  module.def("token_drop_fwd", &diffmoe::token_drop_fwd, Released());
  module.def("token_drop_bwd", &diffmoe::token_drop_bwd, Released());
  module.def("token_choice_drop_fwd", &diffmoe::token_choice_drop_fwd, Released());
}
