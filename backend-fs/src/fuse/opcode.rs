//! Operation codes of the protocol (`enum fuse_opcode`).
#![forbid(unsafe_code)]

/// Defines the enumeration once: variant, number, the kernel's name.
macro_rules! opcodes {
    ($($variant:ident = $number:literal $name:literal,)*) => {
        /// A known operation. A number the DPU sends becomes one only through [`Opcode::from_wire`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        #[allow(missing_docs, reason = "names are the kernel header's")]
        pub enum Opcode {
            $($variant = $number,)*
        }

        impl Opcode {
            /// Every known operation, by number.
            pub const ALL: &'static [Opcode] = &[$(Opcode::$variant,)*];

            /// The operation of this number; `None` when there is none.
            #[inline]
            pub fn from_wire(number: u32) -> Option<Opcode> {
                match number {
                    $($number => Some(Opcode::$variant),)*
                    _ => None,
                }
            }

            /// The kernel's name without its prefix, in lower case; a label for counters.
            pub fn name(self) -> &'static str {
                match self {
                    $(Opcode::$variant => $name,)*
                }
            }
        }
    };
}

opcodes! {
    Lookup = 1 "lookup",
    Forget = 2 "forget",
    Getattr = 3 "getattr",
    Setattr = 4 "setattr",
    Readlink = 5 "readlink",
    Symlink = 6 "symlink",
    Mknod = 8 "mknod",
    Mkdir = 9 "mkdir",
    Unlink = 10 "unlink",
    Rmdir = 11 "rmdir",
    Rename = 12 "rename",
    Link = 13 "link",
    Open = 14 "open",
    Read = 15 "read",
    Write = 16 "write",
    Statfs = 17 "statfs",
    Release = 18 "release",
    Fsync = 20 "fsync",
    Setxattr = 21 "setxattr",
    Getxattr = 22 "getxattr",
    Listxattr = 23 "listxattr",
    Removexattr = 24 "removexattr",
    Flush = 25 "flush",
    Init = 26 "init",
    Opendir = 27 "opendir",
    Readdir = 28 "readdir",
    Releasedir = 29 "releasedir",
    Fsyncdir = 30 "fsyncdir",
    Getlk = 31 "getlk",
    Setlk = 32 "setlk",
    Setlkw = 33 "setlkw",
    Access = 34 "access",
    Create = 35 "create",
    Interrupt = 36 "interrupt",
    Bmap = 37 "bmap",
    Destroy = 38 "destroy",
    Ioctl = 39 "ioctl",
    Poll = 40 "poll",
    NotifyReply = 41 "notify_reply",
    BatchForget = 42 "batch_forget",
    Fallocate = 43 "fallocate",
    Readdirplus = 44 "readdirplus",
    Rename2 = 45 "rename2",
    Lseek = 46 "lseek",
    CopyFileRange = 47 "copy_file_range",
    Setupmapping = 48 "setupmapping",
    Removemapping = 49 "removemapping",
    Syncfs = 50 "syncfs",
    Tmpfile = 51 "tmpfile",
    Statx = 52 "statx",
    CopyFileRange64 = 53 "copy_file_range_64",
}

impl Opcode {
    /// One more than the highest number, for tables that are indexed by [`Opcode::index`].
    pub const TABLE: usize = 54;

    /// Position in a table of [`Opcode::TABLE`] places.
    #[inline]
    pub fn index(self) -> usize {
        self as usize
    }

    /// Whether a request makes an inode with what its extensions say.
    #[inline]
    pub fn makes_inode(self) -> bool {
        matches!(self, Opcode::Symlink | Opcode::Mknod | Opcode::Mkdir | Opcode::Create | Opcode::Tmpfile)
    }

    /// Whether the kernel expects no reply; the chain is completed with length 0.
    #[inline]
    pub fn is_unanswered(self) -> bool {
        matches!(self, Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_the_round_trip_and_fit_the_table() {
        for &opcode in Opcode::ALL {
            assert_eq!(Opcode::from_wire(opcode as u32), Some(opcode));
            assert!(opcode.index() < Opcode::TABLE);
        }
        assert_eq!(Opcode::ALL.len(), 51);
    }

    #[test]
    fn gaps_and_foreign_numbers_are_no_operations() {
        for number in [0, 7, 19, 54, 100, 4096, 1_048_576, 436_207_616, u32::MAX] {
            assert_eq!(Opcode::from_wire(number), None, "{number}");
        }
    }
}
