# The system's side of the emulated machine: what a `syscall` enters, at privilege level 0. It lays the thread's registers where
# linux.py reads them, calls linux.py, and goes on with the thread that linux.py has laid there, which may be another one.
#
# The addresses are those of linux.py: SAVED 0x2000 with sixteen registers, then the base of fs, the place of the vector state,
# and whether the page tables have changed.
.intel_syntax noprefix
.code64

# 0x1000: the machine starts here.
start:
    mov     eax, 0xd
    xor     ecx, ecx
    cpuid
    and     eax, 0xe7               # x87, SSE, AVX, AVX-512: those that the CPU has
    xor     ecx, ecx
    xor     edx, edx
    xsetbv
    jmp     leave

# 0x1040: every system call of the program comes here, with its rip in rcx and its flags in r11.
.org 0x40
enter:
    mov     ds:0x2000, rax
    mov     ds:0x2008, rbx
    mov     ds:0x2010, rcx
    mov     ds:0x2018, rdx
    mov     ds:0x2020, rsi
    mov     ds:0x2028, rdi
    mov     ds:0x2030, rbp
    mov     ds:0x2038, rsp
    mov     ds:0x2040, r8
    mov     ds:0x2048, r9
    mov     ds:0x2050, r10
    mov     ds:0x2058, r11
    mov     ds:0x2060, r12
    mov     ds:0x2068, r13
    mov     ds:0x2070, r14
    mov     ds:0x2078, r15
    rdfsbase rax
    mov     ds:0x2080, rax
    mov     rbx, ds:0x2088
    mov     eax, -1
    mov     edx, -1
    xsave64 [rbx]

    mov     ecx, 0xc0000102         # This register has no use here but that linux.py hears of its writes.
    xor     eax, eax
    xor     edx, edx
    wrmsr

leave:
    cmp     byte ptr ds:0x2090, 0
    je      1f
    mov     rax, cr3
    mov     cr3, rax
1:
    mov     rbx, ds:0x2088
    mov     eax, -1
    mov     edx, -1
    xrstor64 [rbx]
    mov     rax, ds:0x2080
    wrfsbase rax
    mov     rax, ds:0x2000
    mov     rbx, ds:0x2008
    mov     rcx, ds:0x2010
    mov     rdx, ds:0x2018
    mov     rsi, ds:0x2020
    mov     rdi, ds:0x2028
    mov     rbp, ds:0x2030
    mov     rsp, ds:0x2038
    mov     r8, ds:0x2040
    mov     r9, ds:0x2048
    mov     r10, ds:0x2050
    mov     r11, ds:0x2058
    mov     r12, ds:0x2060
    mov     r13, ds:0x2068
    mov     r14, ds:0x2070
    mov     r15, ds:0x2078
    sysretq
