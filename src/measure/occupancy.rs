//! How many blocks of a kernel a multiprocessor holds at once.
//!
//! The rule is that of NVIDIA's occupancy calculator: registers are given out by the warp, shared memory by the block, and
//! both in units (CUDA C++ Programming Guide, technical specifications per compute capability).

use serde::Serialize;

use crate::device::compiler::CompiledKernel;

/// Lanes of a warp.
const LANES: u32 = 32;
/// Registers of a multiprocessor, of each compute capability from 7.0 on.
const REGISTERS: u32 = 65_536;
/// Registers are given to a warp in units of so many.
const REGISTER_UNIT: u32 = 256;
/// Warps get registers in groups of so many.
const WARP_UNIT: u32 = 4;

/// What a multiprocessor has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    warps: u32,
    blocks: u32,
    /// Bytes of shared memory.
    shared: u32,
    /// Bytes of shared memory that each block takes beside its own.
    reserved: u32,
    /// Shared memory is given out in units of so many bytes.
    unit: u32,
}

impl Limits {
    const fn of(arch: u32) -> Option<Self> {
        let [warps, blocks, kilobytes, reserved, unit] = match arch {
            70 => [64, 32, 96, 0, 256],
            75 => [32, 16, 64, 0, 256],
            80 => [64, 32, 164, 1024, 128],
            86 => [48, 16, 100, 1024, 128],
            90 => [64, 32, 228, 1024, 128],
            _ => return None,
        };
        Some(Self { warps, blocks, shared: 1024 * kilobytes, reserved, unit })
    }
}

/// Blocks that a multiprocessor holds at once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Occupancy {
    /// Blocks.
    pub blocks_per_multiprocessor: u32,
    /// Share of the warps that a multiprocessor has room for.
    pub occupancy: f64,
}

impl Occupancy {
    /// Of a kernel launched with so many threads a block; `None` for an architecture that is not known.
    pub fn of(kernel: &CompiledKernel, threads: u32, arch: u32) -> Option<Self> {
        let limits = Limits::of(arch)?;
        let warps = threads.div_ceil(LANES).max(1);
        let registers = (kernel.registers * LANES).next_multiple_of(REGISTER_UNIT).max(REGISTER_UNIT);
        let by_registers = REGISTERS / registers / WARP_UNIT * WARP_UNIT / warps;
        let shared = (kernel.shared + limits.reserved).next_multiple_of(limits.unit);
        let by_shared = limits.shared.checked_div(shared).unwrap_or(limits.blocks);
        let blocks = [limits.blocks, limits.warps / warps, by_registers, by_shared].into_iter().min().unwrap_or(0);
        let occupancy = f64::from(blocks * warps) / f64::from(limits.warps);
        Some(Self { blocks_per_multiprocessor: blocks, occupancy })
    }

    /// So many blocks over those that all multiprocessors of a GPU hold at once; `None` where they hold none.
    pub fn waves(&self, blocks: u64, multiprocessors: u32) -> Option<f64> {
        let at_once = self.blocks_per_multiprocessor * multiprocessors;
        (at_once > 0).then(|| blocks as f64 / f64::from(at_once))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn occupancy_is_that_of_the_calculator() {
        // Registers, shared bytes, threads, architecture; blocks.
        for (registers, shared, threads, arch, blocks) in [
            (75, 0, 256, 70, 3),
            (64, 0, 256, 70, 4),
            (54, 8192, 256, 70, 4),
            (36, 0, 256, 70, 6),
            (25, 0, 256, 70, 8),
            (110, 20_480, 128, 70, 4),
            (144, 40_960, 256, 70, 1),
            (115, 25_600, 128, 70, 3),
            (121, 40_960, 256, 80, 2),
            (32, 0, 64, 75, 16),
            (32, 0, 32, 86, 16),
            (16, 100_000, 128, 90, 2),
        ] {
            let kernel = CompiledKernel {
                instance: String::new(),
                symbol: String::new(),
                registers,
                stack: 0,
                spills: 0,
                shared,
            };
            let got = Occupancy::of(&kernel, threads, arch).unwrap();
            assert_eq!(got.blocks_per_multiprocessor, blocks, "{registers} registers, {shared} bytes, sm_{arch}");
        }
    }
}
