// The list of weight formats. Whoever needs code for the one at hand asks here, once per call of a
// kernel, outside every loop.
namespace kt::KT_ISA {
namespace {

// --8<-- [start:visit]
template <class Visitor>
inline auto VisitFormat(const MatrixLayout& layout, const Visitor& visitor) {
  switch (layout.element) {
    case Element::kBf16: return visitor(Bf16{});
    case Element::kFp8: return visitor(Fp8{});
    case Element::kInt8: return visitor(Int8{});
    case Element::kInt4:
      switch (layout.offset) {
        case Offset::kNone: return visitor(Int4<Offset::kNone>{});
        case Offset::kZeroPoint: return visitor(Int4<Offset::kZeroPoint>{});
        case Offset::kMinimum: return visitor(Int4<Offset::kMinimum>{});
      }
      break;
    case Element::kFp4: return visitor(Fp4{});
  }
  __builtin_unreachable();
}
// --8<-- [end:visit]

}  // namespace
}  // namespace kt::KT_ISA
