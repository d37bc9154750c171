// A convolution of images and its gradient to the kernel by oneDNN, which chooses its instructions (AVX2, AVX512,
// AVX512-BF16, AMX) as it runs.

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

  memory::data_type Type() const { return half ? memory::data_type::bf16 : memory::data_type::f32; }
  memory::desc Image() const { return {{n, i, h, w}, Type(), Tag::nhwc}; }
  memory::desc Result() const { return {{n, o, p, q}, Type(), Tag::nhwc}; }
  memory::desc Kernel() const { return {{o, i, a, b}, Type(), Tag::hwio}; }
  memory::desc AnyKernel(memory::data_type type) const { return {{o, i, a, b}, type, Tag::any}; }

  memory::dims Strides() const { return {stride, stride}; }
  memory::dims Before() const { return {above, left}; }
  memory::dims After() const { return {(p - 1) * stride + a - h - above, (q - 1) * stride + b - w - left}; }
};

Shape Read(ffi::AnyBuffer image, ffi::AnyBuffer kernel, ffi::AnyBuffer result, int64_t stride, int64_t above,
           int64_t left) {
  auto x = image.dimensions(), k = kernel.dimensions(), y = result.dimensions();
  return {x[0], x[1], x[2], x[3], k[0], k[1], k[3], y[1], y[2], stride, above, left,
          image.element_type() == ffi::DataType::BF16};
}

dnnl::primitive_attr OwnScratch() {
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  return attributes;
}

constexpr auto kDirect = dnnl::algorithm::convolution_direct;

// oneDNN's program for a shape, with the order of the kernel's numbers that it likes best.
struct Forward {
  memory::desc packed, scratch;
  dnnl::reorder pack;
  dnnl::convolution_forward convolution;

  explicit Forward(const Shape& s) {
    dnnl::convolution_forward::primitive_desc chosen(Cpu(), dnnl::prop_kind::forward_inference, kDirect, s.Image(),
                                                     s.AnyKernel(s.Type()), s.Result(), s.Strides(), s.Before(),
                                                     s.After(), OwnScratch());
    packed = chosen.weights_desc();
    scratch = chosen.scratchpad_desc();
    pack = dnnl::reorder(dnnl::reorder::primitive_desc(Cpu(), s.Kernel(), Cpu(), packed));
    convolution = dnnl::convolution_forward(chosen);
  }

  void Run(dnnl::stream& stream, memory x, memory kernel, memory y, memory packed, memory scratch) const {
    pack.execute(stream, kernel, packed);
    convolution.execute(stream, {{DNNL_ARG_SRC, x},
                                 {DNNL_ARG_WEIGHTS, packed},
                                 {DNNL_ARG_DST, y},
                                 {DNNL_ARG_SCRATCHPAD, scratch}});
  }
};

// The same of the gradient to the kernel, whose sums are float32.
struct Backward {
  memory::desc packed, scratch;
  dnnl::reorder unpack;
  dnnl::convolution_backward_weights convolution;

  explicit Backward(const Shape& s) {
    auto wide = s.AnyKernel(memory::data_type::f32);
    dnnl::convolution_forward::primitive_desc forward(Cpu(), dnnl::prop_kind::forward_training, kDirect, s.Image(),
                                                      s.AnyKernel(s.Type()), s.Result(), s.Strides(), s.Before(),
                                                      s.After());
    dnnl::convolution_backward_weights::primitive_desc chosen(Cpu(), kDirect, s.Image(), wide, s.Result(), s.Strides(),
                                                              s.Before(), s.After(), forward, OwnScratch());
    packed = chosen.diff_weights_desc();
    scratch = chosen.scratchpad_desc();
    unpack = dnnl::reorder(dnnl::reorder::primitive_desc(Cpu(), packed, Cpu(), s.Kernel()));
    convolution = dnnl::convolution_backward_weights(chosen);
  }

  void Run(dnnl::stream& stream, memory x, memory kernel, memory y, memory packed, memory scratch) const {
    convolution.execute(stream, {{DNNL_ARG_SRC, x},
                                 {DNNL_ARG_DIFF_DST, y},
                                 {DNNL_ARG_DIFF_WEIGHTS, packed},
                                 {DNNL_ARG_SCRATCHPAD, scratch}});
    unpack.execute(stream, packed, kernel);
  }
};

template <class Program>
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

memory At(const memory::desc& desc, const ffi::AnyBuffer& buffer) { return memory(desc, Cpu(), buffer.untyped_data()); }

// A program for the shape of image, kernel and result, one of which it makes of the others.
template <class Program>
ffi::Error Run(ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::AnyBuffer y, int64_t stride, int64_t above, int64_t left) {
  thread_local Room packed_room, scratch_room;
  try {
    const Shape shape = Read(x, kernel, y, stride, above, left);
    const auto& program = Compiled<Program>(shape);
    dnnl::stream stream(Cpu());
    memory packed(program.packed, Cpu(), packed_room.Take(program.packed.get_size()));
    memory scratch(program.scratch, Cpu(), scratch_room.Take(program.scratch.get_size()));
    program.Run(stream, At(shape.Image(), x), At(shape.Kernel(), kernel), At(shape.Result(), y), packed, scratch);
    stream.wait();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

ffi::Error Convolution(ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::Result<ffi::AnyBuffer> y, int64_t stride,
                       int64_t above, int64_t left) {
  return Run<Forward>(x, kernel, *y, stride, above, left);
}

ffi::Error KernelGradient(ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::Result<ffi::AnyBuffer> kernel, int64_t stride,
                          int64_t above, int64_t left) {
  return Run<Backward>(x, *kernel, dy, stride, above, left);
}

auto Bound() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("stride")
      .Attr<int64_t>("above")
      .Attr<int64_t>("left");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DiffjaxConvolution, Convolution, Bound());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DiffjaxKernelGradient, KernelGradient, Bound());
