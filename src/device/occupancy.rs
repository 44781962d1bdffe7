//! How many blocks of a kernel a multiprocessor holds at once, and the shared memory that it takes to hold them.
//!
//! The rule is that of NVIDIA's occupancy calculator: registers are given out by the warp, shared memory by the block, and
//! both in units (CUDA C++ Programming Guide, technical specifications per compute capability).

use serde::Serialize;

use super::compiler::CompiledKernel;

/// Lanes of a warp.
pub(super) const LANES: u32 = 32;
/// Registers of a multiprocessor, of each compute capability from 7.0 on.
const REGISTERS: u32 = 65_536;
/// Registers are given to a warp in units of so many.
const REGISTER_UNIT: u32 = 256;
/// Warps get registers in groups of so many.
const WARP_UNIT: u32 = 4;

/// Shared memory that every split between it and the first cache leaves where any is wanted: the least of sm_75.
const ALWAYS_SHARED: u32 = 32 << 10;

/// What a multiprocessor has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    pub warps: u32,
    pub blocks: u32,
    /// Bytes of shared memory.
    pub shared: u32,
    /// Bytes of shared memory that each block takes beside its own.
    pub reserved: u32,
    /// Shared memory is given out in units of so many bytes.
    pub unit: u32,
}

/// What a kernel takes of a multiprocessor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Needs {
    /// Registers per thread.
    pub registers: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block, static and dynamic.
    pub shared: u32,
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

    /// Bytes of shared memory that a block takes, those kept beside its own included.
    fn of_block(self, needs: Needs) -> u32 {
        (needs.shared + self.reserved).next_multiple_of(self.unit)
    }

    /// Blocks that warps and registers leave room for.
    fn blocks_of_threads(self, needs: Needs) -> u32 {
        let warps = needs.threads.div_ceil(LANES).max(1);
        let registers = (needs.registers * LANES).next_multiple_of(REGISTER_UNIT).max(REGISTER_UNIT);
        let by_registers = REGISTERS / registers / WARP_UNIT * WARP_UNIT / warps;
        self.blocks.min(self.warps / warps).min(by_registers)
    }

    /// The percentage of the shared memory of a multiprocessor that holds as many blocks as warps and registers leave room
    /// for, the rest being the first cache's; `None` where they need so little that every split has it, or none at all. A
    /// driver that is not asked may split for a single block.
    pub fn carve_out(self, needs: Needs) -> Option<u32> {
        let needed = (self.blocks_of_threads(needs) * self.of_block(needs)).min(self.shared);
        let wanted = needs.shared > 0 && needed > ALWAYS_SHARED;
        wanted.then(|| (100 * needed).div_ceil(self.shared))
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
        let needs = Needs { registers: kernel.registers, threads, shared: kernel.shared };
        let by_shared = limits.shared.checked_div(limits.of_block(needs)).unwrap_or(limits.blocks);
        let blocks = limits.blocks_of_threads(needs).min(by_shared);
        let warps = threads.div_ceil(LANES).max(1);
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

    #[test]
    fn the_carve_out_holds_the_blocks_that_registers_and_warps_allow() {
        // Registers, shared bytes, threads, architecture; percent.
        for (registers, shared, threads, arch, percent) in [
            // Two blocks of 41 KiB of 164 and of 228, the tiles of 128 by 128.
            (121, 40_960, 256, 80, Some(50)),
            (121, 40_960, 256, 90, Some(36)),
            // One block, for which registers leave no second.
            (144, 40_960, 256, 70, Some(42)),
            (110, 20_480, 128, 70, Some(84)),
            // More than there is.
            (32, 40_960, 128, 80, Some(100)),
            (64, 12_288, 256, 75, Some(75)),
            // As much as every split has, and none.
            (54, 8192, 256, 70, None),
            (64, 128, 256, 80, None),
            (32, 0, 128, 90, None),
        ] {
            let got = Limits::of(arch).unwrap().carve_out(Needs { registers, threads, shared });
            assert_eq!(got, percent, "{registers} registers, {shared} bytes, sm_{arch}");
        }
    }
}
