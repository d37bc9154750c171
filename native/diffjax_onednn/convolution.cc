// A convolution of images by oneDNN, which chooses its instructions (AVX2, AVX512, AVX512-BF16, AMX) as it runs.

#include <array>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>

#include "oneapi/dnnl/dnnl.hpp"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using dnnl::memory;
using Tag = memory::format_tag;

const dnnl::engine& Cpu() {
  static const dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
  return cpu;
}

// Everything that a program is compiled from: images (n, h, w, i), kernel (a, b, i, o), result (n, p, q, o).
struct Shape {
  int64_t n, h, w, i, a, b, o, p, q, stride, above, left;
  bool half;

  auto Key() const { return std::array<int64_t, 13>{n, h, w, i, a, b, o, p, q, stride, above, left, half}; }
};

// oneDNN's program for a shape, with the order of the kernel's numbers that it likes best.
struct Program {
  memory::desc x, kernel, y, packed, scratch;
  dnnl::reorder pack;
  dnnl::convolution_forward convolution;

  explicit Program(const Shape& s) {
    auto type = s.half ? memory::data_type::bf16 : memory::data_type::f32;
    x = memory::desc({s.n, s.i, s.h, s.w}, type, Tag::nhwc);
    y = memory::desc({s.n, s.o, s.p, s.q}, type, Tag::nhwc);
    kernel = memory::desc({s.o, s.i, s.a, s.b}, type, Tag::hwio);
    int64_t below = (s.p - 1) * s.stride + s.a - s.h - s.above, right = (s.q - 1) * s.stride + s.b - s.w - s.left;
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    dnnl::convolution_forward::primitive_desc chosen(
        Cpu(), dnnl::prop_kind::forward_inference, dnnl::algorithm::convolution_direct, x,
        memory::desc({s.o, s.i, s.a, s.b}, type, Tag::any), y, {s.stride, s.stride}, {s.above, s.left}, {below, right},
        attributes);
    packed = chosen.weights_desc();
    scratch = chosen.scratchpad_desc();
    pack = dnnl::reorder(dnnl::reorder::primitive_desc(Cpu(), kernel, Cpu(), packed));
    convolution = dnnl::convolution_forward(chosen);
  }
};

const Program& Compiled(const Shape& shape) {
  static std::map<std::array<int64_t, 13>, std::unique_ptr<Program>> programs;
  static std::mutex lock;
  std::lock_guard<std::mutex> held(lock);
  auto& program = programs[shape.Key()];
  if (!program) program = std::make_unique<Program>(shape);
  return *program;
}

// Memory that a thread keeps from call to call, for it is as large as a kernel each time.
class Room {
 public:
  void* Take(size_t bytes) {
    if (bytes > size_) {
      std::free(start_);
      size_ = (bytes + 63) / 64 * 64;
      start_ = std::aligned_alloc(64, size_);
      if (start_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return start_;
  }
  ~Room() { std::free(start_); }

 private:
  void* start_ = nullptr;
  size_t size_ = 0;
};

ffi::Error Convolution(ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::Result<ffi::AnyBuffer> y, int64_t stride,
                       int64_t above, int64_t left) {
  thread_local Room packed_room, scratch_room;
  auto in = x.dimensions(), k = kernel.dimensions(), out = y->dimensions();
  try {
    const Program& program = Compiled({in[0], in[1], in[2], in[3], k[0], k[1], k[3], out[1], out[2], stride, above, left,
                                       x.element_type() == ffi::DataType::BF16});
    dnnl::stream stream(Cpu());
    memory packed(program.packed, Cpu(), packed_room.Take(program.packed.get_size()));
    memory scratch(program.scratch, Cpu(), scratch_room.Take(program.scratch.get_size()));
    memory given(program.kernel, Cpu(), kernel.untyped_data());
    program.pack.execute(stream, given, packed);
    program.convolution.execute(stream, {{DNNL_ARG_SRC, memory(program.x, Cpu(), x.untyped_data())},
                                         {DNNL_ARG_WEIGHTS, packed},
                                         {DNNL_ARG_DST, memory(program.y, Cpu(), y->untyped_data())},
                                         {DNNL_ARG_SCRATCHPAD, scratch}});
    stream.wait();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DiffjaxConvolution, Convolution,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("above")
                                  .Attr<int64_t>("left"));
