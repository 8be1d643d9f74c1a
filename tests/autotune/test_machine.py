"""Readers of machine code on small listings, and occupancy against worked examples."""

from __future__ import annotations

import pytest

from kexaone.autotune import gcn, sass
from kexaone.autotune.machine import Access, Loop, Product
from kexaone.autotune.occupancy import occupancy
from kexaone.kernels.arch import ARCHS

SASS = """
.text.scale:
	//## File "/home/me/scale.py", line 7
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
	//## File "/home/me/scale.py", line 8
        /*0020*/               @P1 LDG.E.U16 R9, desc[UR4][R2.64+0x10] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64] ;
.L_x_1:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/                   STL.64 [R1], R10 ;
        /*0060*/                   LDL R10, [R1] ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
	//## File "/home/me/scale.py", line 9
        /*0080*/                   UTMALDG.2D [UR8], [UR6], desc[UR10] ;
        /*0090*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00a0*/                   REDG.E.ADD.F32 desc[UR4][R2.64], R4 ;
        /*00b0*/                   EXIT ;
.L_x_2:
        /*00c0*/                   BRA `(.L_x_2);
        /*00d0*/                   NOP;
"""
USAGE = """
 Function scale:
  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

GCN = """
	.text
scale:                                  ; @scale
	.file	1 "/home/me" "scale.py"
	.loc	1 7 0 prologue_end              ; scale.py:7:0
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	buffer_load_dwordx4 v[10:13], v3, s[12:15], 0 offen
	.file	2 "standard.py"
.LBB0_1:                                ; in Loop: Header=BB0_1 Depth=1
	.loc	2 8 4 is_stmt 1
	global_load_dword v1, v2, s[2:3]
	global_load_lds_dwordx4 v1, s[2:3]
	buffer_load_dword v1, s[0:3], 0 offen lds
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
	s_nop 0
	scratch_store_dwordx2 off, v[0:1], s32
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	.loc	1 9 0
	global_store_short_d16_hi v0, v1, s[2:3]
	global_atomic_add_f32 v0, v1, s[2:3]
	s_endpgm
	.amdgpu_metadata
amdhsa.kernels:
  - .agpr_count:     16
    .private_segment_fixed_size: 8
    .vgpr_count:     48
    .vgpr_spill_count: 2
...
	.end_amdgpu_metadata
"""


def test_sass():
    code = sass.parse(SASS, USAGE)
    assert (code.registers, code.stack, code.spilled, code.instructions) == (40, 8, 12, 13)
    assert code.mma == {"HGMMA": 1}
    assert code.accesses == (
        Access("load", 16, ("scale.py", 7)),
        Access("load", 2, ("scale.py", 8)),
        Access("async", 16, ("scale.py", 8)),
        Access("bulk", 0, ("scale.py", 9)),
        Access("store", 4, ("scale.py", 9)),
        Access("atomic", 4, ("scale.py", 9)),
    )
    # 64 x 128 x 16 by four warps
    assert code.products == (Product(4, 2 * 64 * 128 * 16 / 4),)
    # the jump onto itself after the end is no loop
    assert code.loops == (Loop(4, 7),)
    assert code.widths("load") == {2: 1, 16: 1}
    assert code.count("load") == 2 and code.count("load", 16) == 1


@pytest.mark.parametrize(
    ("mnemonic", "size"),
    [("LDG.E", 4), ("LDG.E.64", 8), ("LDG.E.S8", 1), ("LDG.E.128.STRONG.GPU", 16),
     ("LDG.E.ENL2.256", 32), ("STG.E.U8", 1)],
)  # fmt: skip
def test_width_of_a_mnemonic(mnemonic, size):
    assert sass.width(mnemonic) == size


@pytest.mark.parametrize(
    ("mnemonic", "flops"),
    [("HMMA.16816.F32.BF16", 4096), ("QMMA.16832.F32.E4M3.E4M3", 8192),
     ("QGMMA.64x256x32.F32.E4M3.E4M3", 64 * 256 * 32 / 2), ("UTCHMMA", None)],
)  # fmt: skip
def test_work_of_a_matrix_instruction(mnemonic, flops):
    assert sass.product_flops(mnemonic) == flops


def test_sass_without_usage_is_refused():
    with pytest.raises(ValueError, match="no resource usage"):
        sass.parse(SASS, "cuobjdump info: none")


def test_gcn():
    code = gcn.parse(GCN)
    assert (code.registers, code.stack, code.spilled, code.instructions) == (48, 8, 8, 11)
    assert code.mma == {"MFMA": 1}
    assert code.accesses == (
        Access("load", 16, ("scale.py", 7)),
        Access("load", 4, ("standard.py", 8)),
        Access("async", 16, ("standard.py", 8)),
        Access("async", 4, ("standard.py", 8)),
        Access("store", 2, ("scale.py", 9)),
        Access("atomic", 4, ("scale.py", 9)),
    )
    assert code.products == (Product(5, 2 * 32 * 32 * 8),)
    assert code.loops == (Loop(2, 7),)


def test_gcn_without_metadata_is_refused():
    with pytest.raises(ValueError, match="no vgpr_count"):
        gcn.parse("\ts_endpgm\n")


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs", "limit"),
    [
        # 64 warps / 8
        ("sm_90", 32, 0, 8, 8, "warps"),
        # 65536 / (168 * 32) = 12.19: 3 warps in each of 4 parts
        ("sm_90", 168, 0, 4, 3, "registers"),
        # 228 KiB / (100 + 1)
        ("sm_90", 32, 100 * 1024, 4, 2, "shared memory"),
        ("sm_80", 255, 163 * 1024, 8, 1, "registers"),
        ("sm_89", 16, 0, 1, 24, "programs"),
        # 512 registers of a SIMD's lane / 128: 4 waves on each of 4
        ("gfx942", 128, 0, 4, 4, "registers"),
        ("gfx942", 64, 64 * 1024, 8, 1, "shared memory"),
        ("sm_90", 32, 240 * 1024, 4, 0, "shared memory"),
    ],
)
def test_occupancy(arch, registers, shared, warps, programs, limit):
    found = occupancy(ARCHS[arch], registers=registers, shared=shared, warps=warps)
    assert (found.programs, found.limit) == (programs, limit)
    assert found.warps == programs * warps
